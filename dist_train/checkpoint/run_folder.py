"""The folder of a run: its layout, its lock, and starting anew without losing what was there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dist_train.config.load import read_config
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError


class RunFolder:
    """Paths of a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.requeue = path / "requeue"
        self.lock = path / "lock"
        self.changes = path / "changes.jsonl"
        self.stop = path / "stop"
        self.fault = path / "fault.txt"

    def create(self) -> None:
        """Make the folder and see that it can be written; UserError when it cannot."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"{self.path}: the run folder cannot be written: {os.strerror(error.errno or 0)}") from None

    def move_aside(self) -> Path | None:
        """Rename an older run out of the way, to the first free `<name>.old-N`; None when there is nothing to move."""
        if all(path == self.lock for path in self.path.iterdir()):
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.replace(target)
        return target


def opened_run(path: Path) -> tuple[RunFolder, JobConfig]:
    """A run that is there, and the configuration that it was last trained with; UserError when it is not a run."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"{path}: is not a run folder (it has no config.yaml)")
    return folder, read_config(folder.config)


class RunLock:
    """Holds a run folder against a second job, for as long as this process lives.

    The lock is the kernel's (flock), so it cannot be left behind by a job that died; the file says who holds it.
    A job that was just stopped gets `patience_seconds` to finish its last save and leave.
    """

    def __init__(self, file: Path, holder: Mapping[str, Any], patience_seconds: float = 5.0) -> None:
        self._file = file
        self._patience_seconds = patience_seconds
        self._holder = holder
        self._stream: IO[str] | None = None

    def __enter__(self) -> RunLock:
        deadline = time.monotonic() + self._patience_seconds
        stream = self._file.open("a+")
        while not self._holds(stream):
            stream.close()
            if time.monotonic() >= deadline:
                raise UserError(f"{self._file.parent}: another job is using this run folder: {self._who()}")
            time.sleep(0.1)
            stream = self._file.open("a+")
        stream.seek(0)
        stream.truncate()
        json.dump(dict(self._holder), stream)
        stream.flush()
        self._stream = stream
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder back; a second call does nothing."""
        if self._stream is not None:
            self._stream.truncate(0)
            self._stream.close()
            self._stream = None

    def _holds(self, stream: IO[str]) -> bool:
        """Lock the open file, and see that it is still the one in the folder: the holder may have moved it aside."""
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(stream.fileno()), self._file.stat())
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
                raise
        return False

    def _who(self) -> str:
        try:
            holder = json.loads(self._file.read_text())
            return ", ".join(f"{key} {value}" for key, value in holder.items())
        except (OSError, ValueError, AttributeError):
            return "it has not said who it is"


def this_process(job_id: str | None) -> dict[str, Any]:
    """Who holds a lock: host, process, and the scheduler's job where there is one."""
    return {"host": socket.gethostname(), "process": os.getpid()} | ({"job": job_id} if job_id else {})
