"""The table that every killed job trains on, and what an uninterrupted run makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.resume.jobs import Trap, folder_of, outcome, run_job, tiny_job, write_table

Whole = Callable[[int], tuple[dict[str, Any], list[list[str]]]]


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "clients.csv")


@pytest.fixture(scope="session")
def uninterrupted(table: Path) -> Whole:
    """World size -> the outcome of a run that nobody interrupts, and the file operations of each of its saves."""

    @cache
    def whole(ranks: int) -> tuple[dict[str, Any], list[list[str]]]:
        record = table.parent / f"operations{ranks}.json"
        arguments = tiny_job(table, table.parent / f"uninterrupted{ranks}")
        ended = run_job(arguments, ranks, Trap(record=str(record)))
        assert ended.codes == [0] * ranks, ended.errors
        return outcome(folder_of(arguments)), json.loads(record.read_text())

    return whole
