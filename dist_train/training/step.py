"""One optimizer step: forward, backward, reduction over ranks, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dist_train.runtime.collectives import Collectives
from dist_train.training.objective import Objective
from dist_train.training.parts import Batch
from dist_train.training.reduction import Reduction


class Outcome(NamedTuple):
    """What a step leaves, the same on every rank.

    `totals` holds, summed over ranks, the loss's numerator, its denominator and the votes to stop, (3,) float64 on
    the device; `grad_norm` is the global norm before clipping; `finite` is false when loss or gradient were not
    finite, and then nothing was updated. `rows` counts all ranks' rows.
    """

    totals: Tensor
    grad_norm: Tensor
    finite: Tensor
    learning_rate: float
    rows: int


class Step(Protocol):
    """A step trains on this rank's batches of one optimizer step; a faster one has the same signature."""

    def __call__(self, batches: Sequence[Batch], step: int, *, wants_stop: bool) -> Outcome: ...


class EagerStep:
    """The plain step.

    `begin` tells the modules of `model` which batch comes next; `reduction` sums the gradients over ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        learning_rate: Callable[[int], float],
        begin: Callable[[Batch], None],
        reduction: Reduction,
        collectives: Collectives,
        *,
        max_grad_norm: float | None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.begin = begin
        self.reduction = reduction
        self.collectives = collectives
        self.max_grad_norm = max_grad_norm
        self.autocast_dtype = autocast_dtype
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, batches: Sequence[Batch], step: int, *, wants_stop: bool) -> Outcome:
        """Train on the batches unless the loss or the gradient is not finite on some rank."""
        lr = self._set_learning_rate(step)
        rows = sum(batch.global_rows for batch in batches)
        # Of each slice: loss, weight, and the vote to stop.
        sums = torch.zeros((len(batches[0].slices), 3), dtype=torch.float64, device=self.collectives.device)
        self.reduction.begin()
        for index, batch in enumerate(batches):
            self.begin(batch)
            with self.reduction.backward_of(last=index == len(batches) - 1):
                with torch.autocast(self.collectives.device.type, self.autocast_dtype, self.autocast_dtype is not None):
                    loss, weight = self.objective(self.model, batch)
                # Divided by rows, the sum is the mean when rows weigh 1.
                self.reduction.backward(loss.sum() * (self.reduction.divisor / rows))
            sums[:, 0] += loss.detach()
            sums[:, 1] += weight
        sums[:, 2] = wants_stop
        totals = self.collectives.fold(sums)
        self.reduction.finish()
        norm = self._scale_and_clip(rows / totals[1])
        finite = totals[0].isfinite() & norm.isfinite()
        self._update(finite)
        return Outcome(totals, norm, finite, lr, rows)

    def _set_learning_rate(self, step: int) -> float:
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _scale_and_clip(self, factor: Tensor) -> Tensor:
        """Turn the mean over rows into the mean over weights and clip its global norm; the norm before clipping."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        factor = factor.to(gradients[0].dtype)
        norm = torch.nn.utils.get_total_norm(gradients) * factor
        if self.max_grad_norm is not None:
            factor = factor * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        return norm

    def _update(self, finite: Tensor) -> None:
        # The fused kernel leaves everything as it is where `found_inf` is 1: the decision stays on the device.
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
