"""A small trained run that the tests of this folder share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.in_process import command
from tests.cli.tables import clients, run_arguments


@dataclass(frozen=True)
class Trained:
    """A run folder and the CSV file it was trained on. Read only."""

    folder: Path
    csv: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained once for all tests."""
    folder = tmp_path_factory.mktemp("trained")
    csv = folder / "clients.csv"
    clients().write_csv(csv)
    outcome = command("train", *run_arguments(folder / "runs" / "small", csv))
    assert outcome.code == 0, outcome.err
    return Trained(folder / "runs" / "small", csv)
