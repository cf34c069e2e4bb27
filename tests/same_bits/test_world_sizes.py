"""The exact mode's promise: the world size is not an argument of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.commands import REPOSITORY
from tests.dist.sessions import BUILTIN, train
from tests.ranks import on_ranks
from tests.resume.jobs import finish, tiny_job, write_table

# Everything that could depend on the cut: weights of classes, embeddings, the average, two passes, ragged tails.
EVERYTHING = ("train.class_weights=balanced", "model.embedding_dim=3", "train.label_smoothing=0.1")


def default_job(run_dir: Path, virtual_ranks: int) -> list[str]:
    """One epoch of the default job at a global batch that leaves a ragged tail."""
    return [
        str(REPOSITORY / "configs" / "credit_risk.yaml"), f"run.dir={run_dir.parent}", f"run.name={run_dir.name}",
        "train.epochs=1", "train.global_batch_size=1000", f"train.virtual_ranks={virtual_ranks}", "log.every_steps=5",
        "wandb.mode=disabled", "runtime.device=cpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("virtual_ranks", "worlds"),
    [
        (8, (2, 8)),
        (24, (3, 6)),
        pytest.param(8, (4,), marks=pytest.mark.slow),  # in the daily suite, of a small job, in test_kills.py
        pytest.param(24, (2,), marks=pytest.mark.slow),
    ],
)
def test_the_default_job_is_the_same_bits(tmp_path: Path, virtual_ranks: int, worlds: tuple[int, ...]) -> None:
    alone = finish(default_job(tmp_path / "1", virtual_ranks), 1)
    assert alone["lines"][-2]["samples"] % 1000  # ragged
    for world in worlds:
        assert finish(default_job(tmp_path / str(world), virtual_ranks), world) == alone, world


@pytest.mark.parametrize("world", [2, 3])
def test_everything_on_and_empty_slices_are_the_same_bits(tmp_path: Path, world: int) -> None:
    # 16 rows in two passes of 12 slices: each has empty ones.
    table = write_table(tmp_path / "clients.csv")
    more = ("train.virtual_ranks=12", "train.max_steps=40", *EVERYTHING)
    alone = finish(tiny_job(table, tmp_path / "alone", *more), 1)
    assert finish(tiny_job(table, tmp_path / "several", *more), world) == alone


def test_another_number_of_slices_rounds_differently(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    shas = {
        finish(tiny_job(table, tmp_path / str(v), f"train.virtual_ranks={v}", "train.max_steps=20"))["weights_sha256"]
        for v in (1, 2, 8)
    }
    assert len(shas) == 3  # else the tests above could not fail


@pytest.mark.parametrize(
    ("precision", "seed", "steps", "tolerance"),
    # In float32 sooner or later a rounding turns one ReLU of one row, and the two trainings part: see docs/log.md. When
    # depends on the processor, so only the first steps are compared closely.
    [
        ("float32", 0, 10, 1e-5),
        pytest.param("float32", 1, 10, 1e-5, marks=pytest.mark.slow),
        pytest.param("float32", 2, 10, 1e-5, marks=pytest.mark.slow),
        ("float64", 0, 200, 1e-10),
    ],
)
def test_the_fast_mode_agrees_to_rounding(precision: str, seed: int, steps: int, tolerance: float) -> None:
    arguments = [*BUILTIN, "train.epochs=12", "train.global_batch_size=1000", "train.max_steps=200", "model.dropout=0"]
    arguments += [f"train.precision={precision}", f"run.seed={seed}"]
    fast = on_ranks(1, train, arguments)[0]
    exact = on_ranks(1, train, [*arguments, "train.virtual_ranks=8"])[0]
    assert len(fast.losses) == 200
    assert np.abs(fast.losses - exact.losses)[:steps].max() < tolerance
    assert np.abs(fast.losses - exact.losses).max() < 1e-2
    assert not np.array_equal(fast.losses, exact.losses)
