"""The fast mode on several ranks, each of which holds a part of the model: torch's FSDP2, `fully_shard`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.batch_norm import sync_batch_norm, zero_grad_of_biases_before_batchnorm
from dist_train.determinism.dropout import convert_dropout
from dist_train.determinism.recompute import layers_of
from dist_train.distributed.collectives import Collectives
from dist_train.execution.base import Inputs
from dist_train.execution.flat_parameters import ParameterLayout
from dist_train.execution.shards import LocalShards, ShardedModel
from dist_train.training.protocols import DeferredSteps, GradientReducer
from dist_train.training.step import EagerStep, Step


class FSDPExecution:
    """Each rank holds a part of the parameters, their gradients and their moments.

    The parameters of a layer are gathered from all ranks while it is computed, forwards and backwards. A layer is a
    member of an outermost nn.ModuleList; what is in none of them is gathered together.
    """

    name = "fsdp"
    settled = True
    deferred: DeferredSteps | None = None
    builds_on: torch.device | None = torch.device("cpu")

    def __init__(self, collectives: Collectives, context: ModelContext) -> None:
        self.context = context
        self._collectives = collectives
        self._mesh = init_device_mesh(collectives.device.type, (collectives.size,))

    def prepare(self, model: nn.Module, sample: Inputs, name: str) -> nn.Module:  # noqa: ARG002
        """Keyed dropout and synchronised BatchNorm, then the shards; the model comes on the host and leaves it."""
        model = sync_batch_norm(convert_dropout(model, self.context), self._collectives, self.context)
        return self.place(zero_grad_of_biases_before_batchnorm(model))

    def place(self, model: nn.Module) -> nn.Module:
        """The same, held in shards, in place; state_dict keys stay."""
        root = root_of(model)
        for layer in layers_of(root):
            self._shard(layer)
        self._shard(root)
        model.to(self._collectives.device)  # buffers outside of what is sharded
        kind = type(model)
        model.__class__ = type(f"Sharded{kind.__name__}", (ShardedModel, kind), {})
        model.collectives = self._collectives  # type: ignore[assignment]
        return model

    def _shard(self, module: nn.Module) -> None:
        if next(module.parameters(), None) is None:
            return
        # The root as well is sharded again after its forward pass: in evaluation no backward pass would do it.
        sharded = fully_shard(module, mesh=self._mesh, reshard_after_forward=True)
        # Gradients are summed; the step divides them by the weight of all rows. gloo knows no other reduction.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def lay_out(self, parameters: Iterable[nn.Parameter]) -> ParameterLayout:
        """Parameters stay where their shards are."""
        return LocalShards(parameters, self._collectives)

    def reduce(
        self,
        model: nn.Module,
        parameters: ParameterLayout,
        sample: Inputs,  # noqa: ARG002
    ) -> tuple[nn.Module, GradientReducer]:
        """The model itself; its hooks sum the gradients."""
        return model, ShardReducer(parameters, self._collectives)

    def step(self, eager: EagerStep) -> Step:
        """The eager step."""
        return eager

    def close(self) -> None:
        """Nothing is held."""


class ShardReducer:
    """Each backward pass sums the gradients over the ranks, and each rank keeps the sums of its own rows.

    So it is in every pass of an accumulated step: a rank never holds a whole gradient for longer than a layer takes.
    """

    grad_scale = 1

    def __init__(self, parameters: ParameterLayout, collectives: Collectives) -> None:
        self._collectives = collectives
        self._flat = parameters.zeros()
        self._sums = torch.empty(0)
        self._square = torch.empty(0)
        # fully_shard adds to gradients that are there.
        for parameter, own in zip(parameters.parameters, parameters.views(self._flat), strict=True):
            assert isinstance(parameter, DTensor)
            parameter.grad = DTensor.from_local(
                own, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )

    def begin(self, sums: Tensor) -> None:
        """Forget the gradients of the step before."""
        self._sums = sums
        self._flat.zero_()

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Every pass is reduced."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Parameters are gathered and gradients reduced in here: a rank that waits for the others waits in here."""
        with self._collectives.heartbeat.backward("reduce_scatter of gradients in the backward pass"):
            loss.sum().backward()

    def finish(self) -> tuple[Tensor, Tensor]:
        """The sums over all ranks, and this rank's rows of the gradients."""
        self._square = self._flat.double().square().sum().view(1)
        self._collectives.all_reduce(self._sums, self._square)
        return self._sums[0], self._flat

    def norm(self, gradients: Tensor) -> Tensor:  # noqa: ARG002
        """The norm over all ranks."""
        return self._square[0].sqrt()


def root_of(model: nn.Module) -> nn.Module:
    """The outermost module to shard: `sharded_root` where a model names one.

    fully_shard moves the arguments of its root to the device, and lengths of texts must stay on the host.
    """
    root = getattr(model, "sharded_root", model)
    assert isinstance(root, nn.Module)
    return root
