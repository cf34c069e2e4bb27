"""The core promise: after any kill the same command ends in the bits of a run that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resume.conftest import Whole
from tests.resume.jobs import Trap, finish, folder_of, run_job, tiny_job


def test_the_job_exercises_what_could_be_forgotten(table: Path, uninterrupted: Whole) -> None:
    whole, saves = uninterrupted(1)
    run_dir = table.parent / "uninterrupted1"
    checkpoint = run_dir / "checkpoints" / f"step_{whole['steps']:08d}"
    assert {p.name for p in checkpoint.iterdir()} == {
        "model.pth", "optimizer.pth", "average.pth", "meter.pth", "task.json", "state.json", "MANIFEST.json",
    }  # fmt: skip
    assert whole["steps"] < 30 * 7  # it stopped early
    assert whole["best_step"] != whole["steps"]  # what is shipped has to be read back from a checkpoint
    rows = next(line["samples"] for line in whole["lines"] if line["split"] == "valid")
    assert rows % 16 > 1  # a ragged last batch
    assert len(saves) > 10
    assert any(line["step"] % 5 not in (0, 1) for line in whole["lines"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_kill_after_another_changes_no_bit(table: Path, tmp_path: Path, uninterrupted: Whole, ranks: int) -> None:
    whole, saves = uninterrupted(ranks)
    assert saves[6].index("os.rename") < saves[6].index("os.remove")  # the new one stands before an old one goes
    assert saves[6].count("fsync") == 9
    traps = [
        Trap(step=3),  # nothing has been saved yet
        Trap(save=1, kind="fsync", nth=4, tear=True),
        Trap(save=1, kind="os.rename"),  # whole, but not yet real
        Trap(save=2, kind="open", nth=7),  # before the manifest
        Trap(save=4, kind="fsync", nth=9),  # made real, and killed at once
        Trap(save=4, kind="os.remove", nth=3),  # half of an old checkpoint is gone
        Trap(step=52),  # in the middle of an epoch, of a line of metrics, and of losing patience
    ]
    arguments = tiny_job(table, tmp_path / f"killed{ranks}")
    if ranks == 2:  # where the second rank makes a difference
        traps = [traps[0], traps[2], traps[5], traps[6]]
    for trap in traps:
        ended = run_job(arguments, ranks, trap)
        assert ended.killed, (trap, ended)
        assert not (folder_of(arguments) / "summary.json").exists()
    assert finish(arguments, ranks) == whole
    names = [p.name for p in (folder_of(arguments) / "checkpoints").iterdir()]
    assert all(name.startswith("step_") for name in names), names


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_kill_on_more_ranks_changes_no_bit(table: Path, tmp_path: Path, ranks: int) -> None:
    """Sums of more than two ranks depend on the order in which they are added: it must survive a restart."""
    short = ("train.epochs=4", "train.early_stopping_patience=null")
    whole = finish(tiny_job(table, tmp_path / f"uninterrupted{ranks}", *short), ranks)
    arguments = tiny_job(table, tmp_path / f"killed{ranks}", *short)
    assert run_job(arguments, ranks, Trap(step=17)).killed
    assert finish(arguments, ranks) == whole


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_kill_before_every_file_operation_of_a_save_changes_no_bit(
    table: Path, tmp_path: Path, uninterrupted: Whole
) -> None:
    whole, saves = uninterrupted(1)
    for save in (1, 7):
        for number in range(1, len(saves[save - 1]) + 1):
            arguments = tiny_job(table, tmp_path / f"save{save}-{number}")
            assert run_job(arguments, 1, Trap(save=save, nth=number, tear=True)).killed
            assert finish(arguments) == whole, (save, number, saves[save - 1][number - 1])
