"""One optimizer step: forward, backward, reduction over ranks, clipping, AdamW, moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dist_train.determinism.batch_context import BatchContext
from dist_train.distributed.collectives import Collectives
from dist_train.training.loss import Objective
from dist_train.training.protocols import Average, Batch, GradientReducer, Optimizer

Number = Tensor | float
"""A number in a tensor of its own, (), on a GPU; a plain one on the CPU."""


class StepResult(NamedTuple):
    """What a step leaves, the same on every rank.

    `totals` holds, summed over ranks, the loss's numerator, its denominator and the votes to stop, (3,) float64 on
    the device; `grad_norm` is the global norm before clipping; `finite` is false when loss or gradient were not
    finite, and then nothing was updated. `rows` counts all ranks' rows.
    """

    totals: Tensor
    grad_norm: Number
    finite: Tensor | bool
    learning_rate: float
    rows: int


class Step(Protocol):
    """A step trains on this rank's batches of one optimizer step; a faster one has the same signature."""

    def __call__(self, batches: Sequence[Batch], step: int, *, wants_stop: bool) -> StepResult: ...


Computation = Callable[[Sequence[Batch], float | Tensor, float | Tensor], tuple[Tensor, Number, Tensor | bool]]
"""From batches, learning rate and vote to stop: totals, gradient norm and whether both are finite."""


class Forward(Protocol):
    """A model that is told with its inputs where the batch stands."""

    def __call__(self, inputs: tuple[Tensor, ...], context: BatchContext) -> Tensor: ...


class EagerStep:
    """The plain step.

    `forward` gives the logits of a batch's inputs at a place in the training order; `reducer` sums the gradients over
    ranks; `average` follows the parameters of each step. `computation` is `compute`, or what replaces it.
    """

    def __init__(
        self,
        forward: Forward,
        objective: Objective,
        optimizer: Optimizer,
        learning_rate: Callable[[int], float],
        reducer: GradientReducer,
        collectives: Collectives,
        *,
        max_grad_norm: float | None,
        autocast_dtype: torch.dtype | None = None,
        average: Average | None = None,
    ) -> None:
        self.forward = forward
        self.objective = objective
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.reducer = reducer
        self.collectives = collectives
        self.max_grad_norm = max_grad_norm
        self.autocast_dtype = autocast_dtype
        self.average = average
        self.computation: Computation = self.compute

    def __call__(self, batches: Sequence[Batch], step: int, *, wants_stop: bool) -> StepResult:
        """Train on the batches unless the loss or the gradient is not finite on some rank."""
        lr = self.learning_rate(step)
        return StepResult(
            *self.computation(batches, lr, float(wants_stop)), lr, sum(batch.global_rows for batch in batches)
        )

    def compute(
        self, batches: Sequence[Batch], lr: float | Tensor, vote: float | Tensor
    ) -> tuple[Tensor, Number, Tensor | bool]:
        """The step itself: totals, gradient norm, and whether both were finite. Nothing in it waits for a GPU."""
        device = self.collectives.device
        if device.type != "cpu" and not isinstance(lr, Tensor):
            # A number of the GPU's memory, as it is when the step is recorded: the kernel is another one.
            lr = torch.full((), lr, device=device)
        self.accumulate(batches, vote, self.reducer)
        totals, gradients = self.reducer.finish()
        sum_of_losses, sum_of_weights, _ = self._numbers(totals)
        # The sum over rows becomes the mean over weights; where they are all 0 so are the gradients.
        if batches[0].weights is not None:
            sum_of_weights = one_for_zero(sum_of_weights)
        factor: Number = self.reducer.grad_scale / sum_of_weights
        norm: Number = self._numbers(self.reducer.norm(gradients))[0] * factor
        if self.max_grad_norm is not None:
            factor = factor * at_most_one(self.max_grad_norm / (norm + 1e-6))
        finite = is_finite(sum_of_losses + norm)
        gradients *= factor
        self.optimizer.step(gradients, lr, finite)
        if self.average is not None:
            self.average.update(finite)
        return totals, norm, finite

    def accumulate(self, batches: Sequence[Batch], vote: float | Tensor, reducer: GradientReducer) -> None:
        """Forward and backward pass of each batch: the reducer then has what it is to sum over ranks."""
        # Of each slice: loss, weight, and the vote to stop.
        sums = torch.zeros((len(batches[0].context.slices), 3), dtype=torch.float64, device=self.collectives.device)
        losses, weights, votes = sums.unbind(1)
        votes += vote
        reducer.begin(sums)
        for index, batch in enumerate(batches):
            with reducer.backward_of(last=index == len(batches) - 1):
                with self._precision():
                    logits = self.forward(batch.inputs, replace(batch.context, global_rows=batch.global_rows))
                    loss, weight = self.objective(logits, batch.targets, batch.context.slices, *weights_of(batch))
                losses += loss.detach()
                weights += weight
                reducer.backward(loss)

    def _numbers(self, tensor: Tensor) -> Sequence[Number]:
        """What is in a small tensor: on the CPU plain numbers, which Python handles faster; on a GPU nobody waits."""
        return tensor.view(-1).tolist() if tensor.device.type == "cpu" else tensor.view(-1).unbind()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.collectives.device.type, self.autocast_dtype)


def weights_of(batch: Batch) -> tuple[Tensor, ...]:
    """The weights of a batch's rows, if there are: an objective need not take any."""
    return () if batch.weights is None else (batch.weights,)


def one_for_zero(number: Number) -> Number:
    """The number, or 1 where it is 0."""
    return number + (number == 0).to(number.dtype) if isinstance(number, Tensor) else number or 1.0


def at_most_one(number: Number) -> Number:
    """The number, or 1 if it is larger."""
    return number.clamp(max=1.0) if isinstance(number, Tensor) else min(number, 1.0)


def is_finite(number: Number) -> Tensor | bool:
    """Whether a number is neither infinite nor NaN."""
    return number.isfinite() if isinstance(number, Tensor) else math.isfinite(number)
