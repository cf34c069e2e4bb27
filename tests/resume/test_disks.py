"""Disks that fill up, become read-only or vanish under a run: one clear line, nothing lost, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train.run.checkpoint.checkpoints import Checkpoints
from tests.hosts.requirements import require
from tests.resume.conftest import Whole
from tests.resume.jobs import Ended, Trap, finish, folder_of, outcome, run_job, tiny_job

STEP = 12  # between the checkpoint of step 10 and the one of step 14 or 15


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of two megabytes."""
    require(("mount", "umount"))
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    # Once for each mount that a test has made on top of it.
    while subprocess.run(["umount", "--recursive", "--lazy", str(folder)], capture_output=True).returncode == 0:
        continue


def _ended_with(ended: Ended, folder: Path, reason: str) -> None:
    """Exit code 1 everywhere, and as the last line an error that names the folder and the reason."""
    assert set(ended.codes) == {1}, ended.errors
    for errors in ended.errors:
        last = errors.splitlines()[-1]
        assert last.startswith("error: "), errors
        assert str(folder) in last
        assert reason in last
        assert "Traceback" not in errors
        assert errors.count("error:") == 1


def _last_checkpoint(run_dir: Path) -> int:
    """Step of the newest checkpoint, all of them being sound and nothing half-written beside them."""
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=1)
    found, skipped = checkpoints.newest()
    assert found
    assert skipped == []
    assert all(path.name.startswith("step_") for path in checkpoints.folder.iterdir())
    assert not list(run_dir.glob(".partial*"))
    return found.step


FILL = "cat /dev/zero > {}/filler"
FREE = "rm {}/filler"


def test_a_full_disk_between_two_saves_costs_lines_of_metrics_alone(table: Path, tmp_path: Path, disk: Path) -> None:
    quiet = ("log.every_steps=1", "checkpoint.every_steps=1000", "train.early_stopping_patience=null")
    quiet += ("evaluation.every_steps=35", "train.max_steps=70")
    whole = finish(tiny_job(table, tmp_path / "whole", *quiet), 2)
    arguments = tiny_job(table, disk / "run", *quiet)
    trap = Trap(commands={8: FILL.format(disk), 30: FREE.format(disk), 40: FILL.format(disk), 60: FREE.format(disk)})
    ended = run_job(arguments, 2, trap)
    assert ended.codes == [0] * 2, ended.errors
    got = outcome(disk / "run")
    lines, all_lines = got.pop("lines"), whole.pop("lines")
    assert got == whole
    assert [line for line in all_lines if line in lines] == lines, "whole lines, in their order"
    assert len(lines) < len(all_lines)
    assert {line["step"] for line in lines} > {*range(1, 8), *range(31, 41), *range(61, 71)}
    assert ended.errors[0].count("cannot be written (No space left on device): lines of metrics are lost") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_the_run_at_the_next_save(table: Path, disk: Path, uninterrupted: Whole, ranks: int) -> None:
    arguments = tiny_job(table, disk / "run")
    ended = run_job(arguments, ranks, Trap(commands={STEP: FILL.format(disk)}))
    _ended_with(ended, disk / "run" / "checkpoints" / "step_00000014", "No space left on device")
    assert _last_checkpoint(disk / "run") == 10
    subprocess.run(FREE.format(disk), shell=True, check=True)
    assert finish(arguments, ranks) == uninterrupted(ranks)[0]


def test_metrics_that_cannot_be_written_do_not_end_training(table: Path, tmp_path: Path) -> None:
    """The one file that is too large is metrics.jsonl: checkpoints record the length of its whole lines."""
    settings = ("log.every_steps=1", "checkpoint.every_steps=20", "evaluation.every_steps=1000", "train.max_steps=100")
    whole = finish(tiny_job(table, tmp_path / "whole", *settings))
    limit = (tmp_path / "whole" / "metrics.jsonl").stat().st_size * 2 // 3
    largest = max(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints").rglob("*"))
    assert largest < limit, "only metrics.jsonl must hit the limit"
    ended = run_job(tiny_job(table, tmp_path / "run", *settings), 1, Trap(largest_file=limit))
    assert ended.codes == [0], ended.errors
    assert ended.errors[0].count("cannot be written (File too large): lines of metrics are lost") == 1
    got = outcome(tmp_path / "run")
    lines = got.pop("lines")
    assert lines == whole.pop("lines")[: len(lines)]
    assert len(lines) > 50
    assert got == whole


def test_a_folder_that_becomes_read_only(table: Path, disk: Path, uninterrupted: Whole) -> None:
    arguments = tiny_job(table, disk / "run")
    run_dir = folder_of(arguments)
    # With files open in it a file system cannot be made read-only, a mount of it on top of itself can.
    command = f"mount --bind {run_dir} {run_dir} && mount -o remount,bind,ro {run_dir}"
    ended = run_job(arguments, 2, Trap(commands={STEP: command}))
    _ended_with(ended, run_dir / "checkpoints" / "step_00000014", "Read-only file system")
    assert _last_checkpoint(run_dir) == 10
    assert run_job(arguments, 2).codes == [2, 2]
    subprocess.run(["umount", str(run_dir)], check=True)
    assert finish(arguments, 2) == uninterrupted(2)[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_is_removed_does_not_come_back(table: Path, tmp_path: Path, ranks: int) -> None:
    run_dir = tmp_path / "run"
    ended = run_job(tiny_job(table, run_dir), ranks, Trap(commands={STEP: f"rm -rf {run_dir}"}))
    _ended_with(ended, run_dir, "the run folder is gone: removed, or its disk was unmounted")
    assert not run_dir.exists()


def test_a_disk_that_is_unmounted(table: Path, disk: Path) -> None:
    run_dir = disk / "run"
    ended = run_job(tiny_job(table, run_dir), 2, Trap(commands={STEP: f"umount --lazy {disk}"}))
    _ended_with(ended, run_dir, "the run folder is gone: removed, or its disk was unmounted")
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_unmounted_from_the_run_folder_itself(table: Path, disk: Path) -> None:
    ended = run_job(tiny_job(table, disk), 1, Trap(commands={STEP: f"umount --lazy {disk}"}))
    _ended_with(ended, disk, "the run folder was replaced by another one, or its lock file was removed")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("other", ["mkdir {}", "cp -r {}.moved {}"], ids=["empty", "copy"])
def test_a_folder_that_is_replaced_by_another_one(
    table: Path, tmp_path: Path, uninterrupted: Whole, other: str
) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "run.moved"
    arguments = tiny_job(table, run_dir)
    command = f"mv {run_dir} {moved}; " + other.replace("{}", str(run_dir))
    ended = run_job(arguments, 1, Trap(commands={STEP: command}))
    _ended_with(ended, run_dir, "the run folder was replaced by another one")
    assert _last_checkpoint(moved) == 10
    if other.startswith("mkdir"):
        assert list(run_dir.iterdir()) == []
    else:
        assert _last_checkpoint(run_dir) == 10
    shutil.rmtree(run_dir)
    moved.rename(run_dir)
    assert finish(arguments, 1) == uninterrupted(1)[0]


def test_metrics_that_were_removed_are_noticed_although_their_file_is_still_open(table: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    ended = run_job(tiny_job(table, tmp_path / "run"), 1, Trap(commands={STEP: f"rm {metrics}"}))
    _ended_with(ended, metrics, "No such file or directory")
    assert not metrics.exists()
    assert _last_checkpoint(tmp_path / "run") == 10


def test_a_job_whose_folder_was_taken_over_writes_nothing_more(
    table: Path, tmp_path: Path, uninterrupted: Whole
) -> None:
    """As when a host was cut off, lost its lock on a network's file system, and comes back."""
    arguments = tiny_job(table, tmp_path / "run")
    other: dict[str, Any] = {"host": "elsewhere", "job": "5", "restart": 1}
    lock = tmp_path / "run" / "lock"
    ended = run_job(arguments, 1, Trap(commands={STEP: f"echo '{json.dumps(other)}' > {lock}"}))
    _ended_with(ended, tmp_path / "run", "another job has taken the run folder over: host elsewhere, job 5, restart 1")
    assert json.loads(lock.read_text()) == other
    assert _last_checkpoint(tmp_path / "run") == 10
    assert finish(arguments) == uninterrupted(1)[0]
