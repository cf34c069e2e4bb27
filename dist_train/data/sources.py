"""Encoded rows of a split, in memory or on disk, and the batches gathered from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dist_train.data.encoding.encoder import Inputs, smallest_int
from dist_train.data.sampler import MicroBatchIndices, PositionSampler
from dist_train.determinism.batch_context import BatchContext
from dist_train.determinism.position import Position


class Gathered(NamedTuple):
    """Rows of a split on the device: arguments of the model, class indices int64, and weights float64 if there are."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    weights: Tensor | None


class Source(Protocol):
    """Rows that batches can be read from; `row_numbers` are their numbers in the table."""

    @property
    def row_numbers(self) -> Tensor: ...
    @property
    def table(self) -> Gathered | None: ...
    def read(self, index: Tensor) -> Gathered: ...


class Gatherer(Protocol):
    """Makes the batch of a share."""

    def gather(self, share: MicroBatchIndices) -> Batch: ...


class Batch:
    """This rank's rows of one micro-batch, gathered when they are looked at.

    `index` are the places of the rows in the split, (n,) int64; a batch as the sampler made it has them on the host.
    `context` says where in the training order they stand; `global_rows` counts all ranks' rows.
    """

    def __init__(self, source: Source, share: MicroBatchIndices, index: Tensor) -> None:
        self._source = source
        self.index = index
        self.context = BatchContext(share.epoch, share.first_row, share.slices)
        self.global_rows = share.global_rows

    @cached_property
    def _gathered(self) -> Gathered:
        return self._source.read(self.index)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the model, each (n, ...), on the device."""
        return self._gathered.inputs

    @property
    def targets(self) -> Tensor:
        """Class indices, (n,) int64, on the device."""
        return self._gathered.targets

    @property
    def weights(self) -> Tensor | None:
        """Weights of the rows, (n,) float64, on the device; None where every row counts 1."""
        return self._gathered.weights

    @property
    def table(self) -> Gathered | None:
        """All rows of the split, class indices of any integer type; None where they are not on the device."""
        return self._source.table

    @property
    def rows(self) -> Tensor:
        """The rows' numbers in the table, (n,)."""
        return self._source.row_numbers[self.index.to(self._source.row_numbers.device)]

    def by_index(self, index: Tensor, context: BatchContext) -> Batch:
        """A batch of as many rows: those that `index` holds when they are gathered, at another place in the order."""
        twin = copy(self)
        twin.__dict__.pop("_gathered", None)
        twin.index = index
        twin.context = context
        return twin


class ResidentRows:
    """Encoded rows of one split, held as tensors on the device; a batch is one gather by index.

    `inputs` are the arguments of the model, each (rows, ...); `targets` class indices, (rows,) of any integer type;
    `weights` (rows,) float64, or None where every row counts 1.
    """

    on_device = True

    def __init__(
        self, inputs: tuple[Tensor, ...], targets: Tensor, row_numbers: Tensor, weights: Tensor | None = None
    ) -> None:
        self.inputs = inputs
        self.row_numbers = row_numbers
        self.weights = weights
        self._targets = targets

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def targets(self) -> Tensor:
        """Class indices of all rows, (rows,) int64 on the device; made anew at each call."""
        return self._targets.long()

    @property
    def mapped_bytes(self) -> int:
        """Pages of files that a pass over all rows brings into memory: none."""
        return 0

    def slice(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Model inputs of the rows from `start` to `stop`, in the order of the table."""
        return tuple(x[start:stop] for x in self.inputs)

    def gather(self, share: MicroBatchIndices) -> Batch:
        """The batch of a share."""
        return Batch(self, share, share.rows)

    @property
    def table(self) -> Gathered:
        """All rows, class indices of any integer type."""
        return Gathered(self.inputs, self._targets, self.weights)

    def read(self, index: Tensor) -> Gathered:
        """The rows at the places `index`, (n,)."""
        index = index.to(self._targets.device, non_blocking=True)
        weights = None if self.weights is None else self.weights.index_select(0, index)
        inputs = tuple([_gathered(x, index) for x in self.inputs])
        return Gathered(inputs, self._targets.index_select(0, index).long(), weights)


class MappedRows:
    """Encoded rows of one split in mapped memory: what `ResidentRows` does, without holding them.

    `tensors` are `targets` and `rows`, `weights` if there are, and those that `to_inputs` makes the model's arguments
    of, a batch at a time.
    The pages are the kernel's to keep or to drop. On a GPU a batch travels by way of pinned memory.
    """

    on_device = False

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        to_inputs: Callable[[Mapping[str, Tensor]], Inputs],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        others = ("targets", "rows", "weights")
        self._inputs = {name: tensor for name, tensor in tensors.items() if name not in others}
        self._weights = tensors.get("weights")
        self._targets = tensors["targets"]
        self.row_numbers = tensors["rows"]
        self._to_inputs = to_inputs
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
    def weights(self) -> Tensor | None:
        """Weights of all rows, (rows,) float64 on the device, made anew at each call; None: every row counts 1."""
        return None if self._weights is None else self._weights.to(self._device)

    @property
    def mapped_bytes(self) -> int:
        """Pages of files that a pass over all rows brings into memory, as far as memory is free."""
        tensors = [*self._inputs.values(), self._targets, self.row_numbers]
        tensors += [] if self._weights is None else [self._weights]
        return sum(t.numel() * t.element_size() for t in tensors)

    def slice(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Model inputs of the rows from `start` to `stop`, in the order of the table."""
        return self._arguments({name: x[start:stop].to(self._device) for name, x in self._inputs.items()})

    def gather(self, share: MicroBatchIndices) -> Batch:
        """The batch of a share."""
        return Batch(self, share, share.rows)

    @property
    def table(self) -> None:
        """The rows are not on the device."""
        return

    def read(self, index: Tensor) -> Gathered:
        """The rows at the places `index`, (n,), on the device."""
        wanted = (self._targets,) if self._weights is None else (self._targets, self._weights)
        targets, *others = self._sent((*wanted, *self._inputs.values()), index)
        weights = None if self._weights is None else others.pop(0)
        return Gathered(self._arguments(dict(zip(self._inputs, others, strict=True))), targets.long(), weights)

    def _arguments(self, rows: Mapping[str, Tensor]) -> Inputs:
        numeric, flags, codes = self._to_inputs(rows)
        return Inputs(numeric.to(self._dtype), flags, codes)

    def _sent(self, tensors: tuple[Tensor, ...], index: Tensor) -> list[Tensor]:
        if self._pinned is None:
            return [x.index_select(0, index) for x in tensors]
        self._turn = 1 - self._turn
        return self._pinned[self._turn].send(tensors, index)


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


class Feed:
    """Yields what one optimizer step trains on, and the position after it, without end."""

    def __init__(self, rows: Gatherer, sampler: PositionSampler) -> None:
        self.rows = rows
        self.sampler = sampler

    @property
    def num_rows(self) -> int:
        """Training rows of an epoch over all ranks."""
        return self.sampler.num_rows

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.sampler.steps_per_epoch

    def steps(self, position: Position) -> Iterator[tuple[list[Batch], Position]]:
        """Batches from `position` on, one list for each optimizer step."""
        while True:
            shares = self.sampler.shares(position)
            position = self.sampler.step_end(position)
            yield [self.rows.gather(share) for share in shares], position

    def of_rank(self, position: Position, rank: int) -> list[Batch]:
        """What a rank trains on in the optimizer step that starts at `position`."""
        return [self.rows.gather(share) for share in self.sampler.shares(position, rank)]


def resident(
    inputs: Inputs,
    targets: Tensor,
    row_numbers: Tensor,
    num_classes: int,
    device: torch.device,
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> ResidentRows:
    """Put encoded rows on the device, numbers as `dtype` and class indices in the smallest integer type."""
    moved = Inputs(inputs.numeric.to(device, dtype), inputs.flags.to(device), inputs.codes.to(device))
    weights = None if weights is None else weights.to(device)
    return ResidentRows(moved, targets.to(device, smallest_int(num_classes)), row_numbers, weights)


def _gathered(rows: Tensor, index: Tensor) -> Tensor:
    """The rows `index` of a tensor; without any work where it has no columns."""
    return rows.index_select(0, index) if rows.numel() else rows.new_empty((len(index), *rows.shape[1:]))
