"""Rows that stay on disk, mapped to memory, and the batches gathered from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_train.data.feed import Batch
from dist_train.data.sampler import MicroBatchIndices


class MappedRows:
    """Encoded rows of one split in mapped memory: what `ResidentRows` does, without holding them.

    The pages are the kernel's to keep or to drop. On a GPU a batch travels by way of pinned memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        count = len(tensors["targets"])
        features = tensors.get("features", torch.empty((count, 0)))
        self._inputs = (features, tensors["slots"]) if "slots" in tensors else (features,)
        self._targets = tensors["targets"]
        self.row_numbers = tensors["rows"]
        self._device = device
        self._dtype = dtype
        self._pinned = (_Pinned(device), _Pinned(device)) if device.type == "cuda" else None
        self._turn = 0

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def targets(self) -> Tensor:
        """Class indices of all rows, (rows,) int64 on the device; made anew at each call."""
        return self._targets.to(self._device, torch.int64)

    @property
    def on_device(self) -> bool:
        """Whether a batch is gathered without the host."""
        return False

    @property
    def mapped_bytes(self) -> int:
        """Pages of files that a pass over all rows brings into memory, as far as memory is free."""
        tensors = (*self._inputs, self._targets, self.row_numbers)
        return sum(t.numel() * t.element_size() for t in tensors)

    def slice(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Model inputs of the rows from `start` to `stop`, in the order of the table."""
        return tuple(self._as_input(x[start:stop].to(self._device)) for x in self._inputs)

    def gather(self, share: MicroBatchIndices) -> Batch:
        """The batch of a share."""
        return Batch(self, share, share.rows)

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """Inputs and targets of the rows at the places `index`, (n,), on the device."""
        *inputs, targets = self._gathered((*self._inputs, self._targets), index)
        return (*(self._as_input(x) for x in inputs), targets.long())

    def _gathered(self, tensors: tuple[Tensor, ...], index: Tensor) -> list[Tensor]:
        if self._pinned is None:
            return [x.index_select(0, index) for x in tensors]
        self._turn = 1 - self._turn
        return self._pinned[self._turn].send(tensors, index)

    def _as_input(self, rows: Tensor) -> Tensor:
        return rows.to(self._dtype) if rows.is_floating_point() else rows.long()


class _Pinned:
    """Page-locked memory for one batch. With two in turn, one is filled while the other one still travels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    def send(self, tensors: tuple[Tensor, ...], index: Tensor) -> list[Tensor]:
        """The rows `index` of host tensors, on their way to the device."""
        if self._arrived is not None:
            self._arrived.synchronize()  # what the buffers held before has left them
        sent = [self._filled(i, x, index).to(self._device, non_blocking=True) for i, x in enumerate(tensors)]
        self._arrived = torch.cuda.Event()
        self._arrived.record()
        return sent

    def _filled(self, number: int, rows: Tensor, index: Tensor) -> Tensor:
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < len(index):
            buffer = torch.empty((len(index), *rows.shape[1:]), dtype=rows.dtype, pin_memory=True)
            self._buffers[number] = buffer
        return torch.index_select(rows, 0, index, out=buffer[: len(index)])
