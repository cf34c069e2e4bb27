"""One cluster for all tests of this folder, and the answer that every job on it must come to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.requirements import FOR_SLURM, require
from tests.resume.jobs import write_table
from tests.slurm.cluster import Cluster
from tests.slurm.submissions import uninterrupted


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    require(FOR_SLURM)
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "clients.csv")


@pytest.fixture(scope="session")
def whole(table: Path) -> dict[str, Any]:
    """The outcome of a job that nobody interrupts, in one plain process."""
    return uninterrupted(table, table.parent / "whole")
