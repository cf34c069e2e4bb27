"""The table of keys in the documentation is the schema's."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tests.commands import REPOSITORY
from tools.config_reference import BEGIN, END, markdown_table, sections, with_table


def test_the_documentation_has_the_table_of_this_schema() -> None:
    page = (REPOSITORY / "docs/configuration.md").read_text()
    assert page == with_table(page), "run `make docs`"


def test_every_key_has_a_row_with_a_default_and_a_meaning() -> None:
    rows = [line.split(" | ", 2) for line in markdown_table().splitlines()[2:]]
    keys = [f"{prefix}.{key.name}" for prefix, section in sections() for key in fields(section)]
    assert [row[0].removeprefix("| ").strip("`") for row in rows] == keys
    for _, default, meaning in rows:
        assert default.strip("`")
        assert len(meaning.removesuffix(" |")) > 15


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        with_table(f"{BEGIN} {END[:-1]}")
