"""How gradients are summed over ranks: by DistributedDataParallel, or slice by slice in one fixed order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dist_train.runtime.collectives import Collectives
from dist_train.runtime.flat import FlatParameters
from dist_train.runtime.slices import Slices


class Reduction(Protocol):
    """Gradients summed over ranks, divided by `divisor`."""

    divisor: int

    def begin(self) -> None:
        """Forget the gradients of the step before."""

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surrounds the forward and backward pass of a batch, the `last` one of the step or not."""

    def backward(self, loss: Tensor, factor: float) -> None:
        """The backward pass itself, of the sum over slices of `loss`, (slices,), times `factor`."""

    def finish(self) -> Tensor:
        """All backward passes are done: the flat gradients, which the caller may change."""


class AveragedInBackward:
    """The fast mode on several ranks: DistributedDataParallel averages in the last backward pass.

    Where all ranks share memory and the gradients are small, they go through it instead of gloo's all-reduce.
    """

    def __init__(self, model: DistributedDataParallel, parameters: FlatParameters, collectives: Collectives) -> None:
        self.divisor = collectives.size
        self._model = model
        self._parameters = parameters
        self._flat = parameters.zeros()
        self._views = parameters.views(self._flat)
        self._collectives = collectives
        if collectives.share_memory_for(self._flat):
            # A lambda, since torch takes annotations that are text for wrong ones.
            model.register_comm_hook(collectives, lambda state, bucket: _average(state, bucket))

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        gradients = self._gradients()
        if gradients:
            torch._foreach_zero_(gradients)

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:
        """Communicate in the last backward pass alone."""
        return nullcontext() if last else self._model.no_sync()

    def backward(self, loss: Tensor, factor: float) -> None:
        """Gradients are averaged in here: a rank that waits for the others waits in here."""
        with self._collectives.pulse.backward("all_reduce of gradients in the backward pass"):
            loss.backward(torch.full_like(loss, factor))

    def finish(self) -> Tensor:
        """Out of DistributedDataParallel's buckets."""
        torch._foreach_copy_(self._views, self._gradients())
        return self._flat

    def _gradients(self) -> list[Tensor]:
        """Views of the buckets; before the first backward pass there are none."""
        return [p.grad for p in self._parameters.parameters if p.grad is not None]


class FoldedSlices:
    """The modules keep the gradient of each slice; all slices of all ranks are added up in order.

    So it is in the exact mode, and in a world of one. There, in the fast mode, one slice is all there is, nothing is
    added up, and modules that do not know of slices may leave their gradients to autograd.
    """

    divisor = 1

    def __init__(self, slices: Slices, parameters: FlatParameters, collectives: Collectives) -> None:
        self._slices = slices
        self._collectives = collectives
        if len(slices.flat) == 1:
            for parameter in parameters.parameters:
                parameter.grad = parameters.view(slices.flat[0], parameter)

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        self._slices.flat.zero_()

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Nothing is communicated in a backward pass but BatchNorm's sums."""
        return nullcontext()

    def backward(self, loss: Tensor, factor: float) -> None:
        """The modules leave the gradients of their slices."""
        loss.backward(torch.full_like(loss, factor))

    def finish(self) -> Tensor:
        """Gather every slice's gradient and add them up, the same bits on every rank and for every world size."""
        return self._collectives.fold(self._slices.flat)


def _average(collectives: Collectives, bucket: GradBucket) -> Future[Tensor]:
    """What DistributedDataParallel's own all-reduce does to a bucket."""
    average: Future[Tensor] = Future()
    average.set_result(collectives.sum(bucket.buffer().div_(collectives.size)))
    return average
