"""What becomes of each kind of column, as docs/columns.md says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.column_kinds import BEGIN, END, KINDS, Kind, rows_of_page, what_becomes_of

PAGE = Path(__file__).parents[2] / "docs" / "columns.md"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name} {kind.settings or ''}")
def test_a_column_becomes_what_the_page_says(kind: Kind, tmp_path: Path) -> None:
    assert what_becomes_of(kind, tmp_path) == kind.becomes


def test_the_page_has_these_rows() -> None:
    """`python -m tests.data.column_kinds docs/columns.md` writes them."""
    assert len(KINDS) >= 40
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert table.strip().splitlines() == rows_of_page()
