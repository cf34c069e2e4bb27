"""Stand-ins for what training is handed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_train.determinism.batch_context import BatchContext
from dist_train.determinism.position import Position, split_evenly
from dist_train.training.step import StepResult


@dataclass(frozen=True)
class FakeBatch:
    """A batch as training knows it."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    rows: Tensor
    epoch: int = 0
    first_row: int = 0
    global_rows: int = 0
    weights: Tensor | None = None

    @property
    def index(self) -> Tensor:
        """Places of the rows: a fake has its rows in hand."""
        return torch.arange(len(self.targets))

    @property
    def context(self) -> BatchContext:
        """One slice, as in the fast mode."""
        return BatchContext(self.epoch, self.first_row, (len(self.targets),))

    def by_index(self, index: Tensor, context: BatchContext) -> FakeBatch:
        """The rows at these places, each time they are looked at."""
        return FakeBatch(
            tuple(x[index] for x in self.inputs),
            self.targets[index],
            self.rows[index],
            context.epoch,
            context.first_row,
            self.global_rows,
            None if self.weights is None else self.weights[index],
        )


def fake_batch(x: Tensor, y: Tensor, *, rank: int = 0, size: int = 1) -> FakeBatch:
    """This rank's contiguous share of the rows."""
    first, last = split_evenly(0, len(y), size)[rank]
    return FakeBatch((x[first:last],), y[first:last], torch.arange(first, last), 0, first, len(y))


@dataclass
class FakeRows:
    """Rows to evaluate on."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def slice(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return (self.inputs[start:stop],)


@dataclass
class FakeFeed:
    """Epochs of `steps_per_epoch` steps of ten rows."""

    steps_per_epoch: int
    asked: list[Position] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return 10 * self.steps_per_epoch

    def steps(self, position: Position) -> Iterator[tuple[list[Any], Position]]:
        self.asked.append(position)
        while True:
            rows = position.rows + 10
            batch = FakeBatch((), torch.empty(0), torch.arange(position.rows, rows), position.epoch, 0, 10)
            position = Position(position.epoch + 1, 0) if rows == self.num_rows else Position(position.epoch, rows)
            yield [batch], position


@dataclass
class FakeStep:
    """Losses as told; a loss that is not finite is reported as a step reports it."""

    losses: Sequence[float]
    taken: list[int] = field(default_factory=list)

    def __call__(self, batches: Sequence[Any], step: int, *, wants_stop: bool) -> StepResult:  # noqa: ARG002
        self.taken.append(step)
        loss = self.losses[step % len(self.losses)]
        totals = torch.tensor([loss * 10, 10, float(wants_stop)], dtype=torch.float64)
        return StepResult(totals, torch.tensor(1.5), totals[0].isfinite(), 0.1 / (step + 1), 10)
