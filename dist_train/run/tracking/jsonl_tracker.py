"""metrics.jsonl: one JSON object a line."""

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

    A line that cannot be written is lost, with one warning for all of them: training goes on. What the file holds of
    it is overwritten by the next line, or cut off by the next state, so that every line is whole.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: int | None = None
        self._length = 0
        """Bytes of the whole lines in the file."""
        self._warned = False
        self._open()
        self.last_step = _last_step(file)
        """Highest step of any line that was there when the file was opened; 0 when there was none."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        try:
            self._append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s): lines of metrics are lost", self._file, error.strerror)
            self._warned = True

    def close(self) -> None:
        """Close the file. A second call does nothing.

        Raises:
            OSError: the disk does not have every line that was appended.
        """
        if self._handle is None:
            return
        try:
            self._sync()
        finally:
            handle, self._handle = self._handle, None
            os.close(handle)

    def state_dict(self) -> dict[str, Any]:
        """The length in bytes.

        Raises:
            OSError: the disk does not have every line that was appended, or the file is another one by now.
        """
        self._sync()
        return {"bytes": self._length}

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
        self._length = os.fstat(self._handle).st_size

    def _append(self, line: bytes) -> None:
        handle, written = self._not_cut_short(), 0
        while written < len(line):  # a disk that is nearly full takes a part first
            written += os.pwrite(handle, line[written:], self._length + written)
        self._length += len(line)

    def _sync(self) -> None:
        with with_path(self._file):
            handle = self._not_cut_short()
            os.ftruncate(handle, self._length)  # a line that was written in part
            os.fsync(handle)
            if not os.path.samestat(os.fstat(handle), self._file.stat()):
                raise OSError(errno.ENOENT, "the file was replaced by another one")

    def _not_cut_short(self) -> int:
        """The handle of the file, which another process must not have made shorter."""
        assert self._handle is not None, "the file is closed"
        if os.fstat(self._handle).st_size < self._length:
            raise OSError(errno.EIO, "somebody has cut the file short")
        return self._handle


def _last_step(file: Path) -> int:
    step = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                step = max(step, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue  # the torn last line of a killed process
    return step
