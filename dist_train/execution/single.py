"""The fast mode in a world of one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dist_train.accel import accelerate
from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.batch_norm import sync_batch_norm, zero_grad_of_biases_before_batchnorm
from dist_train.determinism.dropout import convert_dropout
from dist_train.distributed.collectives import Collectives
from dist_train.execution.base import Inputs
from dist_train.execution.flat_parameters import FlatParameters, ParameterLayout
from dist_train.execution.reducers import SliceReducer
from dist_train.training.protocols import DeferredSteps, GradientReducer
from dist_train.training.step import EagerStep, Step


class SingleExecution:
    """One process: a batch is one slice, and nothing is summed over ranks.

    `num_slices` are the slices of this rank. `compiles`: whole steps in compiled code, where the model has such.
    """

    name: str = "single"
    settled = True
    builds_on: torch.device | None = None

    def __init__(
        self, collectives: Collectives, context: ModelContext, num_slices: int = 1, *, compiles: bool = False
    ) -> None:
        self.collectives = collectives
        self.context = context
        self.deferred: DeferredSteps | None = None
        self._num_slices = num_slices
        self._compiles = compiles
        self._model: nn.Module | None = None

    def prepare(self, model: nn.Module, sample: Inputs, name: str) -> nn.Module:  # noqa: ARG002
        """Keyed dropout, BatchNorm that rounds as it does on several ranks, and what is faster on this device."""
        model = sync_batch_norm(convert_dropout(model, self.context), self.collectives, self.context)
        model = accelerate(model, self.context, self.collectives.device)
        return zero_grad_of_biases_before_batchnorm(model)

    def place(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def lay_out(self, parameters: Iterable[nn.Parameter]) -> ParameterLayout:
        """All in one tensor."""
        return FlatParameters(parameters)

    def reduce(
        self,
        model: nn.Module,
        parameters: ParameterLayout,
        sample: Inputs,  # noqa: ARG002
    ) -> tuple[nn.Module, GradientReducer]:
        """The model itself; the gradients of all slices are added up in order."""
        self._model = model
        return model, SliceReducer(self.context, self._num_slices, parameters, self.collectives)

    def step(self, eager: EagerStep) -> Step:
        """The eager step, computed by compiled code where that is wanted and possible."""
        if self._compiles and self._model is not None:
            from dist_train.execution.compiled import compile_steps  # imports numba, which takes a while

            compiled = compile_steps(eager, self._model)
            if compiled is not None:
                eager.computation, self.deferred = compiled.compute, compiled
        return eager

    def close(self) -> None:
        """Nothing is held."""
