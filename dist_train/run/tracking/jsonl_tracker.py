"""metrics.jsonl: one JSON object a line; the truth about a run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.system.console import log
from dist_train.system.files import with_path, write_atomically


class JsonlTracker:
    """Appends records. Its state is its length, so that a resumed run cuts off lines of steps that it will redo.

    A line that cannot be written is no reason to stop training. The lines since the last state are kept in memory;
    after a failure all of them are written again, to the place where they belong, at the next line and at the next
    state. Only a state has to be true: it cannot be taken while the disk does not have every line.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: int | None = None
        self._synced = 0
        """Bytes that are on disk."""
        self._tail = bytearray()
        """The lines that follow them."""
        self._written = 0
        """Bytes of the tail that the file has taken. A network's file system can still refuse them at the sync."""
        self._warned = False
        self._open()
        self.last_step = _last_step(file)
        """Highest step of any line that was there when the journal was opened; 0 when there was none."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line, now or as soon as it can be written."""
        self._tail += json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s): lines are kept until it can", self._file, error.strerror)
            self._warned = True

    def close(self) -> None:
        """Close the file; OSError when the disk does not have every line. A second call does nothing."""
        if self._handle is None:
            return
        try:
            self._sync()
        finally:
            handle, self._handle = self._handle, None
            os.close(handle)

    def state_dict(self) -> dict[str, Any]:
        """The length in bytes; OSError when the disk does not have every line."""
        self._sync()
        return {"bytes": self._synced}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut off what was written after the state was taken.

        What is left becomes a new file. A former attempt of this job, on a host that was taken for dead, may still have
        the old one open, and must not write into this one.
        """
        content = self._file.read_bytes()
        if len(content) < state["bytes"]:
            log.warning("%s is shorter than when the checkpoint was written: lines are missing", self._file)
        kept = content[: state["bytes"]]
        write_atomically(self._file, kept[: kept.rfind(b"\n") + 1])
        self._open()

    def _open(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o666)
        self._synced = os.fstat(self._handle).st_size
        self._tail.clear()
        self._written = 0

    def _write(self) -> None:
        assert self._handle is not None, "the journal is closed"
        with with_path(self._file):
            try:
                if os.fstat(self._handle).st_size < self._synced + self._written:
                    raise OSError(errno.EIO, "somebody has cut the file short")
                while self._written < len(self._tail):  # a disk that is nearly full takes a part first
                    rest = bytes(self._tail[self._written :])
                    self._written += os.pwrite(self._handle, rest, self._synced + self._written)
            except OSError:
                self._written = 0
                raise

    def _sync(self) -> None:
        self._write()
        assert self._handle is not None
        with with_path(self._file):
            try:
                os.fsync(self._handle)
            except OSError:
                self._written = 0
                raise
            if not os.path.samestat(os.fstat(self._handle), self._file.stat()):
                raise OSError(errno.ENOENT, "the file was replaced by another one")
        self._synced += len(self._tail)
        self._tail.clear()
        self._written = 0


def _last_step(file: Path) -> int:
    step = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                step = max(step, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue  # the torn last line of a killed process
    return step
