"""How gradients are summed over ranks: by DistributedDataParallel, or slice by slice in one fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from dist_train.runtime.collectives import Collectives
from dist_train.runtime.slices import Slices


class Reduction(Protocol):
    """Leaves in every parameter's `.grad` the sum over ranks, divided by `divisor`."""

    divisor: int

    def begin(self) -> None:
        """Forget the gradients of the step before."""

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surrounds the forward and backward pass of a batch, the `last` one of the step or not."""

    def backward(self, loss: Tensor) -> None:
        """The backward pass itself."""

    def finish(self) -> None:
        """All backward passes are done: the gradients are wanted now."""


class AveragedInBackward:
    """The fast mode: DistributedDataParallel averages in the last backward pass; a world of one has nothing to do."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], collectives: Collectives) -> None:
        self.divisor = collectives.size
        self._no_sync = getattr(model, "no_sync", nullcontext)
        self._parameters = parameters
        self._collectives = collectives

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        for parameter in self._parameters:
            parameter.grad = None

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:
        """Communicate in the last backward pass alone."""
        return nullcontext() if last else self._no_sync()

    def backward(self, loss: Tensor) -> None:
        """Gradients are averaged in here: a rank that waits for the others waits in here."""
        if self.divisor == 1:
            loss.backward()
            return
        with self._collectives.pulse.backward("all_reduce of gradients in the backward pass"):
            loss.backward()

    def finish(self) -> None:
        """Nothing is left to do."""


class FoldedSlices:
    """The exact mode: the modules keep the gradient of each slice apart; all slices of all ranks are added in order."""

    divisor = 1

    def __init__(self, slices: Slices, parameters: Sequence[nn.Parameter], collectives: Collectives) -> None:
        self._slices = slices
        self._parameters = parameters
        self._collectives = collectives

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        self._slices.flat.zero_()

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Nothing is communicated in a backward pass but BatchNorm's sums."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The modules leave the gradients of their slices."""
        loss.backward()

    def finish(self) -> None:
        """Gather every slice's gradient and add them up, the same bits on every rank and for every world size."""
        sums = self._collectives.fold(self._slices.flat)
        sizes = [p.numel() for p in self._parameters]
        for parameter, part in zip(self._parameters, sums.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
