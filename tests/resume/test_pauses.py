"""A job whose processes are all suspended trains on once they go on; a rank that alone stays behind is found."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, environment
from tests.patience import PATIENCE_SECONDS, wait_until
from tests.resume.conftest import Whole
from tests.resume.jobs import finish, folder_of, outcome, tiny_job
from tests.resume.processes import Job, job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")

TIMEOUT_SECONDS, PAUSE_SECONDS = 5, 12


def _all_of(suspended: Job, number: signal.Signals) -> None:
    for process in (suspended.launcher, *suspended.ranks):
        os.kill(process, number)


@pytest.mark.slow
def test_ranks_that_were_all_suspended_end_with_the_same_bits(
    table: Path, tmp_path: Path, uninterrupted: Whole
) -> None:
    arguments = tiny_job(table, tmp_path / "run", f"runtime.timeout_seconds={TIMEOUT_SECONDS}")
    with job(arguments, 2, tmp_path / "log", pause=0.03) as suspended:
        suspended.wait_for_step(6)
        _all_of(suspended, signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        _all_of(suspended, signal.SIGCONT)
        assert suspended.wait() == 0, suspended.log()
    assert suspended.log().count("suspended for") == 1, suspended.log()
    assert outcome(folder_of(arguments)) == uninterrupted(2)[0]
    assert not (folder_of(arguments) / "fault.txt").exists()


@pytest.mark.slow
def test_a_rank_that_does_not_come_back_is_found(table: Path, tmp_path: Path, uninterrupted: Whole) -> None:
    arguments = tiny_job(table, tmp_path / "run", f"runtime.timeout_seconds={TIMEOUT_SECONDS}")
    with job(arguments, 2, tmp_path / "log", pause=0.03) as suspended:
        suspended.wait_for_step(6)
        _all_of(suspended, signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        continued = time.monotonic()
        for process in (suspended.launcher, suspended.ranks[0]):
            os.kill(process, signal.SIGCONT)
        assert suspended.wait() == 1
        assert time.monotonic() - continued < TIMEOUT_SECONDS + 20
    assert "rank 1 " in (folder_of(arguments) / "fault.txt").read_text().splitlines()[1]
    assert "is stopped (SIGSTOP)" in suspended.log()
    assert finish(arguments, 2) == uninterrupted(2)[0]


@pytest.mark.parametrize(
    "start",
    [[], pytest.param(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], marks=pytest.mark.slow)],
    ids=["python", "torchrun"],
)
def test_a_terminal_that_is_closed_stops_and_saves(table: Path, tmp_path: Path, start: list[str]) -> None:
    arguments = tiny_job(table, tmp_path / "run", "train.epochs=100000", "train.early_stopping_patience=null")
    terminal, its_end = pty.openpty()
    command = [sys.executable, *start, "launch/train.py", *arguments]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdin=its_end, stdout=its_end, stderr=its_end,
        preexec_fn=_in_a_session_of_its_own,
    ) as process:  # fmt: skip
        os.close(its_end)
        os.set_blocking(terminal, False)
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size, "a line of metrics")
        os.close(terminal)  # the kernel sends SIGHUP, and every write fails from now on
        process.wait(PATIENCE_SECONDS)
    assert "SIGHUP" in (tmp_path / "run" / "requeue").read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_under_nohup_a_closed_terminal_changes_nothing(table: Path, tmp_path: Path, uninterrupted: Whole) -> None:
    arguments = tiny_job(table, tmp_path / "run")
    command = ["nohup", sys.executable, "launch/train.py", *arguments]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size, "a line of metrics")
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE_SECONDS) == 0
    assert outcome(folder_of(arguments)) == uninterrupted(1)[0]


def _in_a_session_of_its_own() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
