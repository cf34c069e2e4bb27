"""One job at a time in a run folder, and an older run is never overwritten."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.lock import RunLock, this_process
from dist_train.checkpoint.run_folder import RunFolder
from dist_train.errors import UserError
from tests.ranks import _server


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


def test_moving_aside_never_overwrites(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.lock.touch()
    assert folder.move_aside() is None, "there is nothing to keep"
    for number in (1, 2, 3):
        (folder.checkpoints / "step_00000001").mkdir(parents=True)
        (folder.checkpoints / "number").write_text(str(number))
        assert folder.move_aside() == tmp_path / f"run.old-{number}"
        folder.create()
    kept = [(tmp_path / f"run.old-{n}" / "checkpoints" / "number").read_text() for n in (1, 2, 3)]
    assert kept == ["1", "2", "3"]


@pytest.mark.parametrize("parent", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the run folder cannot be written"):
        RunFolder(tmp_path / parent / "run").create()
