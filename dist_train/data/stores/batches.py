"""Where the batches of a table are held: in memory, or in files that are mapped to memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa


class Batches(Protocol):
    """Gives a batch of a unit, both by their index."""

    def __call__(self, unit: int, batch: int) -> pa.RecordBatch: ...


class InMemory:
    """The batches of the only unit of a table. One that was released is gone."""

    def __init__(self, batches: list[pa.RecordBatch]) -> None:
        self._batches: list[pa.RecordBatch | None] = list(batches)

    def __call__(self, unit: int, batch: int) -> pa.RecordBatch:
        assert unit == 0
        return self._batches[batch]

    def release(self, batch: int) -> None:
        """Give the memory of a batch back."""
        self._batches[batch] = None


class InFiles:
    """Batches in Arrow files, one for each unit, mapped to memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._open: tuple[int, Any] | None = None
        self._batch: tuple[int, pa.RecordBatch] | None = None

    def __call__(self, unit: int, batch: int) -> pa.RecordBatch:
        if self._open is None or self._open[0] != unit:
            self._open = unit, pa.ipc.open_file(pa.memory_map(str(self._files[unit])))
            self._batch = None
        if self._batch is None or self._batch[0] != batch:
            self._batch = batch, self._open[1].get_batch(batch)
        return self._batch[1]
