"""Asked to stop, a run saves, says so and leaves with 0; without its launcher it does not train on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from dist_train.distributed.stopping import STOP_SIGNALS
from dist_train.run.checkpoint.lock import RunLock
from tests.resume.conftest import Whole
from tests.resume.jobs import Trap, finish, folder_of, run_job, tiny_job
from tests.resume.processes import job

PAUSE_SECONDS = 0.05  # after each step, so that a signal from outside comes in the middle of training


@pytest.mark.parametrize("told", [(1, 0, 1, 0, 1), pytest.param((0, 1, 0, 1, 0), marks=pytest.mark.slow)], ids=str)
def test_a_signal_to_one_rank_of_two_stops_both_and_nothing_is_lost(
    table: Path, tmp_path: Path, uninterrupted: Whole, told: tuple[int, ...]
) -> None:
    arguments = tiny_job(table, tmp_path / "run")
    run_dir = folder_of(arguments)
    for number, (name, rank) in enumerate(zip(STOP_SIGNALS, told, strict=True)):
        step = 3 + 12 * number
        ended = run_job(arguments, 2, Trap(step=step, signal=name, rank=rank))
        assert ended.codes == [0, 0], ended.errors
        marker = json.loads((run_dir / "requeue").read_text())
        # It is heard at the next vote: that of the next step, or of an evaluation before it.
        assert marker["step"] in (step + 1, step + 2)
        assert (marker["job"], marker["cause"]) == (None, name.name)
        assert f"stopped at step {marker['step']} ({name.name}): saved" in ended.errors[0]
        assert ended.errors[1] == ""
        assert not (run_dir / "summary.json").exists()
    assert finish(arguments, 2) == uninterrupted(2)[0]
    assert not (run_dir / "requeue").exists()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("validation", [0.15, 0])
def test_a_signal_at_the_last_step_leaves_only_what_is_after_it(
    table: Path, tmp_path: Path, ranks: int, validation: float
) -> None:
    more = ("train.max_steps=6", "train.early_stopping_patience=null", f"data.validation_fraction={validation}")
    whole = finish(tiny_job(table, tmp_path / "whole", *more), ranks)
    arguments = tiny_job(table, tmp_path / "run", *more)
    ended = run_job(arguments, ranks, Trap(step=5, signal=signal.SIGTERM))
    assert ended.codes == [0] * ranks, ended.errors
    assert json.loads((tmp_path / "run" / "requeue").read_text())["step"] == 6
    assert not (tmp_path / "run" / "summary.json").exists()
    assert finish(arguments, ranks) == whole
    assert not (tmp_path / "run" / "requeue").exists()


def test_a_stop_file_and_a_time_limit_stop_it_as_well(table: Path, tmp_path: Path, uninterrupted: Whole) -> None:
    arguments = tiny_job(table, tmp_path / "run")
    run_dir = folder_of(arguments)
    # The file is looked for once a second.
    asked = run_job(arguments, 2, Trap(commands={12: f"touch {run_dir}/stop; sleep 1.1"}))
    assert asked.codes == [0, 0], asked.errors
    marker = json.loads((run_dir / "requeue").read_text())
    assert (marker["step"] in (13, 14), marker["cause"]) == (True, f"stop file {run_dir}/stop")
    assert not (run_dir / "stop").exists()
    limited = run_job([*arguments, "run.time_limit_minutes=0.05"], 2, Trap(commands={20: "sleep 3"}))
    assert limited.codes == [0, 0], limited.errors
    assert json.loads((run_dir / "requeue").read_text())["cause"] == "run.time_limit_minutes is over"
    assert finish(arguments, 2) == uninterrupted(2)[0]


def test_a_job_that_waits_for_the_run_folder_leaves_the_stop_file_to_its_holder(table: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "stop").touch()
    with RunLock(run_dir / "lock", {"process": 1}):
        lock = (run_dir / "lock").read_bytes()
        ended = run_job(tiny_job(table, run_dir), 2)
        assert ended.codes == [2, 2], ended.errors
        assert {path.name for path in run_dir.iterdir()} == {"lock", "stop"}
        assert (run_dir / "lock").read_bytes() == lock
    assert "another job is using this run folder" in ended.errors[0]
    # Once it holds the folder, the file is for it: it stops at its first step and removes the file.
    ended = run_job(tiny_job(table, run_dir), 2)
    assert ended.codes == [0, 0], ended.errors
    assert "saved; the same command continues" in ended.errors[0]
    assert not (run_dir / "stop").exists()


def test_a_second_interrupt_does_not_wait(table: Path, tmp_path: Path) -> None:
    arguments = tiny_job(table, tmp_path / "run")
    ended = run_job(arguments, 1, Trap(step=3, signal=signal.SIGINT, times=2))
    assert ended.codes == [-signal.SIGINT], ended.errors
    assert not (tmp_path / "run" / "requeue").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc, and the kernel's parent-death signal")
def test_under_torchrun_a_stop_and_an_orphaned_job_are_mended_by_the_same_command(
    table: Path, tmp_path: Path, uninterrupted: Whole
) -> None:
    arguments = tiny_job(table, tmp_path / "run")
    requeue = folder_of(arguments) / "requeue"

    # torchrun hands SIGTERM on to the ranks; they leave with 0, torchrun itself with 1.
    with job(arguments, 2, tmp_path / "log", pause=PAUSE_SECONDS) as stopped:
        stopped.wait_for_step(3)
        os.kill(stopped.launcher, signal.SIGTERM)
        assert stopped.wait() == 1
        assert "saved; the same command continues" in stopped.log()
        assert "Traceback" not in stopped.log().split("stopped at step")[0]
    step = json.loads(requeue.read_text())["step"]

    # The launcher alone is killed: its ranks notice, save and leave.
    with job(arguments, 2, tmp_path / "log", pause=PAUSE_SECONDS) as orphaned:
        orphaned.wait_for_step(step + 3)
        assert not requeue.exists()
        os.kill(orphaned.launcher, signal.SIGKILL)
        assert orphaned.wait() == -signal.SIGKILL
        assert "saved; the same command continues" in orphaned.log()
    step = json.loads(requeue.read_text())["step"]
    verdict = (folder_of(arguments) / "fault.txt").read_text().splitlines()[1]
    # The lowest rank of the host speaks for it: the store was torchrun's.
    told = rf"rank 0 \(.*\) in stopping, step {step}: its launcher \(torchrun\) has died"
    assert re.fullmatch(told, verdict), verdict

    assert finish(arguments, 2) == uninterrupted(2)[0]
    assert not requeue.exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("to", ["launcher", "rank 0", "rank 1"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_under_torchrun_every_signal_to_anyone_saves(
    table: Path, tmp_path: Path, uninterrupted: Whole, number: signal.Signals, to: str
) -> None:
    arguments = tiny_job(table, tmp_path / "run")
    with job(arguments, 2, tmp_path / "log", pause=PAUSE_SECONDS) as asked:
        asked.wait_for_step(3)
        os.kill(asked.launcher if to == "launcher" else asked.ranks[int(to[-1])], number)
        code = asked.wait()
        assert "saved; the same command continues" in asked.log()
    if to != "launcher":
        assert code == 0
    elif number in (signal.SIGUSR1, signal.SIGUSR2):  # torchrun does not handle them: they kill it
        assert code == -number
    else:
        assert code == 1
    assert json.loads((folder_of(arguments) / "requeue").read_text())["step"] >= 3
    assert finish(arguments, 2) == uninterrupted(2)[0]
