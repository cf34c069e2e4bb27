"""The examples run as they are, in a folder without a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import REPOSITORY
from tests.programs import output_of


@pytest.mark.parametrize("example", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda file: file.name)
def test_example(example: Path, tmp_path: Path) -> None:
    assert "own model:" in output_of(example.read_text(), tmp_path, TMPDIR=str(tmp_path))
