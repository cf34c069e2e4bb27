"""Rows that live on the device, and the batches gathered from them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dist_train.data.sampler import MicroBatchIndices, PositionSampler
from dist_train.determinism.batch_context import BatchContext
from dist_train.determinism.position import Position


class Source(Protocol):
    """Rows that batches can be read from; `row_numbers` are their numbers in the table."""

    @property
    def row_numbers(self) -> Tensor: ...
    def read(self, index: Tensor) -> tuple[Tensor, ...]: ...


class Gatherer(Protocol):
    """Makes the batch of a share."""

    def gather(self, share: MicroBatchIndices) -> Batch: ...


class Batch:
    """This rank's rows of one forward-backward pass, gathered when they are looked at.

    `index` are the places of the rows in the split, (n,) int64; a batch as the sampler made it has them on the host.
    `context` says where in the training order they stand; `global_rows` counts all ranks' rows.
    """

    def __init__(self, source: Source, share: MicroBatchIndices, index: Tensor) -> None:
        self._source = source
        self.index = index
        self.context = BatchContext(share.epoch, share.first_row, share.slices)
        self.global_rows = share.global_rows

    @cached_property
    def _gathered(self) -> tuple[Tensor, ...]:
        return self._source.read(self.index)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the model, each (n, ...), on the device."""
        return self._gathered[:-1]

    @property
    def targets(self) -> Tensor:
        """Class indices, (n,), on the device."""
        return self._gathered[-1]

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
    """Encoded rows of one split, held as tensors on the device; a batch is one gather by index."""

    def __init__(self, inputs: tuple[Tensor, ...], targets: Tensor, row_numbers: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets
        self.row_numbers = row_numbers

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def on_device(self) -> bool:
        """Whether a batch is gathered without the host."""
        return True

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

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """Inputs and targets of the rows at the places `index`, (n,)."""
        index = index.to(self.targets.device, non_blocking=True)
        return (*(x.index_select(0, index) for x in self.inputs), self.targets.index_select(0, index))


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


def resident(
    inputs: tuple[Tensor, ...], targets: Tensor, rows: Tensor, device: torch.device, dtype: torch.dtype
) -> ResidentRows:
    """Put the given rows of encoded tensors on the device, floating-point inputs as `dtype`."""
    moved = tuple(x[rows].to(device, dtype if x.is_floating_point() else None) for x in inputs)
    return ResidentRows(moved, targets[rows].to(device), rows)
