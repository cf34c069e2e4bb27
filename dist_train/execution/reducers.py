"""How gradients are summed over ranks: by DistributedDataParallel, or slice by slice in one fixed order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dist_train.determinism.batch_context import ModelContext
from dist_train.distributed.collectives import Collectives
from dist_train.execution.flat_parameters import ParameterLayout


class DDPReducer:
    """The fast mode on several ranks: DistributedDataParallel reduces in the last backward pass.

    Its buckets are where the gradients are from the beginning. Where all ranks share memory and the gradients are
    small, they go through it, and the sums with them, instead of gloo's all-reduce. `model` must have been through two
    backward passes by then, since it moves its buckets until the second.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        context: ModelContext,
        parameters: ParameterLayout,
        collectives: Collectives,
    ) -> None:
        self._model = model
        self._collectives = collectives
        self._flat = parameters.zeros()
        self._views = parameters.views(self._flat)
        of_bucket = {p: p.grad for p in parameters.parameters if p.grad is not None}
        self._gradients = list(of_bucket.values())
        context.gradients, context.visit_all_parameters = [of_bucket], True
        self._sums = torch.empty(0)
        self._together = collectives.transport_for(self._flat, torch.empty(3, dtype=torch.float64)) is not None
        self.grad_scale = 1 if self._together else collectives.size
        if self._together:
            # A lambda, since torch takes annotations that are text for wrong ones.
            model.register_comm_hook(self, lambda state, bucket: state._add(bucket))

    def begin(self, sums: Tensor) -> None:
        """Forget the gradients of the step before."""
        self._sums = sums
        torch._foreach_zero_(self._gradients)

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:
        """Communicate in the last backward pass alone."""
        return nullcontext() if last else self._model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Gradients are reduced in here: a rank that waits for the others waits in here."""
        with self._collectives.heartbeat.backward("all_reduce of gradients in the backward pass"):
            loss.sum().backward()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Out of DistributedDataParallel's buckets."""
        torch._foreach_copy_(self._views, self._gradients)
        if not self._together:
            self._collectives.all_reduce(self._sums)
        return self._sums[0], self._flat

    def norm(self, gradients: Tensor) -> Tensor:
        """Every rank has all of them."""
        norm: Tensor = torch.linalg.vector_norm(gradients)
        return norm

    def _add(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Add up a bucket over the ranks, and what else there is with the last one."""
        done: Future[Tensor] = Future()
        done.set_result(self._collectives.all_reduce(bucket.buffer(), *([self._sums] if bucket.is_last() else [])))
        return done


class SliceReducer:
    """The modules keep the gradient of each slice; all slices of all ranks are added up in order.

    So it is in the exact mode, and in a world of one. There, in the fast mode, one slice is all there is, nothing is
    added up, and modules that do not know of slices may leave their gradients to autograd.
    """

    grad_scale = 1

    def __init__(
        self, context: ModelContext, num_slices: int, parameters: ParameterLayout, collectives: Collectives
    ) -> None:
        self._collectives = collectives
        self._arithmetic = context.arithmetic
        self._flat = parameters.zeros(num_slices)
        context.gradients = [{p: parameters.view(own, p) for p in parameters.parameters} for own in self._flat]
        self._sums = torch.empty(0)
        if num_slices == 1:
            for parameter in parameters.parameters:
                parameter.grad = parameters.view(self._flat[0], parameter)

    def begin(self, sums: Tensor) -> None:
        """Forget the gradients of the step before."""
        self._sums = sums
        self._flat.zero_()

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Nothing is communicated in a backward pass but BatchNorm's sums."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The modules leave the gradients of their slices."""
        loss.sum().backward()

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Of each slice of this rank what is to be added up: (slices, numbers) and (slices, size)."""
        return self._sums, self._flat

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gather every slice's part and add them up, the same bits on every rank and for every world size."""
        return self._collectives.ordered_sum(self._sums), self._collectives.ordered_sum(self._flat)

    def norm(self, gradients: Tensor) -> Tensor:
        """Every rank has all of them."""
        return self._arithmetic.norm(gradients)
