"""metrics.jsonl: one JSON object a line; the truth about a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.runtime.console import log


class Journal:
    """Appends records. Its state is its length, so that a resumed run cuts off lines of steps that it will redo."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream = file.open("ab", buffering=0)
        self.last_step = _last_step(file)
        """Highest step of any line that was there when the journal was opened; 0 when there was none."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        line = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        while line:  # a disk that is nearly full takes a part first, and refuses the rest
            line = line[self._stream.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def state_dict(self) -> dict[str, Any]:
        """The length in bytes, once all of it is on disk."""
        os.fsync(self._stream.fileno())
        return {"bytes": self._file.stat().st_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut off what was written after the state was taken."""
        size = self._file.stat().st_size
        if size < state["bytes"]:
            log.warning("%s is shorter than when the checkpoint was written: lines are missing", self._file)
        os.truncate(self._file, _end_of_lines(self._file, min(size, state["bytes"])))


def _end_of_lines(file: Path, limit: int) -> int:
    """Bytes of the whole lines among the first `limit` bytes."""
    with file.open("rb") as stream:
        return stream.read(limit).rfind(b"\n") + 1


def _last_step(file: Path) -> int:
    step = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                step = max(step, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue  # the torn last line of a killed process
    return step
