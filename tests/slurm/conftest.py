"""One cluster for all tests of this folder, and the answer that every job on it must come to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.requirements import FOR_SLURM, require
from tests.resume.jobs import write_table
from tests.slurm.cluster import Cluster
from tests.slurm.stories import Stage, Stories
from tests.slurm.submissions import uninterrupted


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    require(FOR_SLURM)
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def stories(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stories]:
    """See `tests/slurm/stories.py`."""
    folder = tmp_path_factory.mktemp("stories")
    table = write_table(folder / "clients.csv")
    whole = uninterrupted(table, folder / "whole")
    begun = Stories(request.session.items, lambda name: Stage(cluster, table, folder / name, whole))
    yield begun
    begun.close()
