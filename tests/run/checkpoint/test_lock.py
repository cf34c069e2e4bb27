"""One job at a time in a run folder, and whoever has lost it knows."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dist_train.errors import TrainingFault, UserError
from dist_train.run.checkpoint.lock import RunLock, this_process
from dist_train.run.checkpoint.run_folder import RunFolder
from tests.ranks import _server


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    caplog.set_level(logging.INFO, "dist_train")
    return caplog


def _hold(file: Path, pipe: Connection) -> None:
    with RunLock(file, this_process({"SLURM_JOB_ID": "4711"})):
        pipe.send(os.getpid())
        pipe.recv()


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    ours, theirs = _server().Pipe()
    holder = _server().Process(target=_hold, args=(file, theirs))
    holder.start()
    try:
        assert ours.poll(30)
        process = ours.recv()
        who = f"host {socket.gethostname()}, process {process}, job 4711"
        with pytest.raises(UserError, match=f"another job is using this run folder: {who}"):
            RunLock(file, this_process({}), patience_seconds=0).__enter__()
        os.kill(process, signal.SIGKILL)
        with RunLock(file, this_process({}), patience_seconds=30):
            assert f'"process": {os.getpid()}' in file.read_text()
    finally:
        holder.kill()
        holder.join()


def test_a_lock_is_given_back_once(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "lock", {"process": 1}, 0)
    with first:
        first.release()
        first.release()
        with RunLock(tmp_path / "lock", {"process": 2}, 0), pytest.raises(UserError, match="process 2"):
            RunLock(tmp_path / "lock", {}, 0).__enter__()
    with RunLock(tmp_path / "lock", {}, 0):
        pass


def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path) -> None:
    with RunLock(tmp_path / "lock", {}, 0):
        (tmp_path / "lock").write_text("{half")
        with pytest.raises(UserError, match="it has not said who it is"):
            RunLock(tmp_path / "lock", {}, 0).__enter__()


def test_a_run_moved_aside_between_opening_and_locking_is_not_the_one_that_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.config.touch()
    lock = fcntl.flock

    def too_late(*arguments: Any) -> None:
        monkeypatch.undo()
        assert folder.move_aside() == tmp_path / "run.old-1"
        folder.create()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with RunLock(folder.lock, {"process": 1}, 30), pytest.raises(UserError, match="process 1"):
        RunLock(folder.lock, {}, 0).__enter__()


def test_a_run_folder_that_is_being_moved_aside_is_waited_for(tmp_path: Path) -> None:
    """With run.resume=never the holder moves the folder aside, and for a moment there is none."""
    folder = RunFolder(tmp_path / "run")
    waiting = RunLock(folder.lock, {"process": 2}, 0.3)
    assert not waiting.take(0)
    folder.create()
    with (
        RunLock(folder.lock, {"process": 1}),
        pytest.raises(UserError, match="another job is using this run folder: process 1"),
    ):
        waiting.take()


def _attempt(job: str, restart: int) -> dict[str, Any]:
    return this_process({"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)})


def test_an_element_of_a_job_array_is_named_as_its_user_knows_it(tmp_path: Path) -> None:
    array = {"SLURM_JOB_ID": "124", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"}
    who = f"host {socket.gethostname()}, process {os.getpid()}, job 124, restart 0, array 120_4, since 2"
    with RunLock(tmp_path / "lock", this_process(array)), pytest.raises(UserError, match=who):
        RunLock(tmp_path / "lock", this_process({}), 0).take()


def test_an_earlier_attempt_of_the_same_job_is_waited_for(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "lock"
    with RunLock(file, _attempt("123", 1)) as former:
        who = r"another job is using this run folder: host .*, job 123, restart 1, since [^.]*$"
        for stranger in (_attempt("124", 2), _attempt("123", 1), _attempt("123", 0), this_process({})):
            with pytest.raises(UserError, match=who):
                RunLock(file, stranger, 0, 60).take()
        assert heard.records == []
        ours = RunLock(file, _attempt("123", 2), 0, 60)
        assert not ours.take(0)
        assert not ours.take(0)
        (said,) = heard.records
        assert said.getMessage().startswith("waiting up to 60 s until an earlier attempt of this job has left the run")
        assert "job 123, restart 1" in said.getMessage()
        former.release()
        assert ours.take(0)
        assert ours.former["restart"] == 1
        ours.release()
    with RunLock(file, _attempt("123", 2)), pytest.raises(UserError, match=f"lost for good, remove {file}"):
        RunLock(file, _attempt("123", 3), 60, 0).take()


@pytest.mark.parametrize("content", ["", "{half", "[]", '{"job": "123"}', '{"job": "123", "restart": "x"}'])
def test_a_holder_that_says_nonsense_is_a_stranger(tmp_path: Path, content: str) -> None:
    with RunLock(tmp_path / "lock", {}):
        (tmp_path / "lock").write_text(content)
        with pytest.raises(UserError, match="another job is using this run folder"):
            RunLock(tmp_path / "lock", _attempt("123", 1), 0, 60).take()


def _lose(lock: RunLock) -> None:
    """As an NFS server does with the locks of a client that was cut off."""
    assert lock._stream is not None
    fcntl.flock(lock._stream, fcntl.LOCK_UN)


def test_a_lock_that_was_lost_is_taken_again_unless_somebody_else_had_it(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with RunLock(file, _attempt("123", 0)) as first:
        first.confirm()
        _lose(first)
        first.confirm()
        with pytest.raises(UserError):
            RunLock(file, {}, 0).take()
        _lose(first)
        with RunLock(file, _attempt("123", 1)) as second:
            with pytest.raises(TrainingFault, match=f"{tmp_path}: another job has taken the .* job 123, restart 1"):
                first.confirm()
            second.confirm()
        with pytest.raises(TrainingFault, match="another job has taken"):
            first.confirm()  # although nobody holds it now: what is in the folder is no longer what it was
    assert json.loads(file.read_text())["restart"] == 1


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _copied(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    shutil.copytree(folder.with_name("moved"), folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_gone, "the run folder is gone: removed, or its disk was unmounted"),
        (_empty, "the run folder was replaced by another one, or its lock file was removed"),
        (_copied, "the run folder was replaced by another one, or its lock file was removed"),
    ],
)
def test_another_folder_or_none_is_noticed(tmp_path: Path, change: Any, reason: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.confirm()  # who has no lock has nothing to lose
    folder.create()
    with RunLock(folder.lock, {"process": 1}) as folder.held:
        folder.confirm()
        change(folder.path)
        with pytest.raises(TrainingFault, match=f"{folder.path}: {reason}; nothing more is saved in it"):
            folder.confirm()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_server_that_does_not_know_the_folder_any_more_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with RunLock(tmp_path / "lock", {"process": 1}) as lock, monkeypatch.context() as patch:

        def fails(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        patch.setattr(os, "stat", fails)
        reason = "is gone: removed" if number == errno.ESTALE else "cannot be reached: Input/output error"
        with pytest.raises(TrainingFault, match=f"{tmp_path}: the run folder {reason}"):
            lock.confirm()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_the_second_job_takes_over_and_the_first_one_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture, number: int
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunLock(tmp_path / "lock", {"process": 1}) as first:
        first.confirm()
        first.confirm()
        (warning,) = heard.records
        assert f"{tmp_path}: this file system has no locks ({os.strerror(number)})" in warning.getMessage()
        with RunLock(tmp_path / "lock", {"process": 2}) as second:
            second.confirm()
            with pytest.raises(TrainingFault, match="another job has taken the run folder over: process 2"):
                first.confirm()
