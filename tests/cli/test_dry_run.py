"""`--dry-run` predicts the memory of the run. `make bench` compares its speed with the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.workload import write_table
from tests.commands import REPOSITORY, run, train

CREDIT_RISK = REPOSITORY / "configs" / "credit_risk.yaml"
# How much memory a process takes depends on allocator, libc and kernel, too: not for every machine's everyday suite.
pytestmark = pytest.mark.slow


def dry_run_bytes(*arguments: object, ranks: int = 1) -> float:
    """The peak that a dry run speaks of."""
    done = run("train", *arguments, "wandb.mode=disabled", "--dry-run", ranks=ranks)
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak +about ([\d,]+) MiB a rank", done.stderr)
    assert found, done.stderr
    assert re.search(r"speed +about [\d,]+ rows/s", done.stderr), done.stderr
    return float(found[1].replace(",", "")) * 2**20


def test_two_ranks_take_the_memory_of_the_dry_run(tmp_path: Path) -> None:
    arguments = (CREDIT_RISK, "train.max_steps=100", "runtime.device=cpu")
    expected = dry_run_bytes(*arguments, f"run.dir={tmp_path / 'dry'}", ranks=2)
    assert list(tmp_path.iterdir()) == []
    assert train(tmp_path / "run", *arguments, ranks=2)["peak_memory_bytes"] == pytest.approx(expected, rel=0.25)


def test_large_batches_of_a_larger_table_take_the_memory_of_the_dry_run(tmp_path: Path) -> None:
    """The activations of 65,536 rows are most of it, so a dry run that trains nothing is far off."""
    arguments = (
        *write_table(tmp_path / "table.parquet", 65536), "train.global_batch_size=65536", "train.epochs=5",
        "runtime.device=cpu",
    )  # fmt: skip
    expected = dry_run_bytes(*arguments, f"run.dir={tmp_path / 'dry'}")
    assert not (tmp_path / "dry").exists()
    assert train(tmp_path / "run", *arguments)["peak_memory_bytes"] == pytest.approx(expected, rel=0.25)
