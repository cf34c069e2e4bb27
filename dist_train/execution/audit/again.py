"""The forward and backward pass of a step, computed a second time in other memory, without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import ModelContext
from dist_train.execution.audit.tape import PlayingTape
from dist_train.execution.flat_parameters import ParameterLayout
from dist_train.execution.reducers import SliceReducer
from dist_train.training.protocols import Batch
from dist_train.training.step import EagerStep


class SecondComputation:
    """Computes slices of a step again: weights, gradients and what is between them are elsewhere than the first time.

    Frozen weights and the rows of the table are not copied. Gradients, buffers and parameters are afterwards what they
    were.
    """

    def __init__(self, eager: EagerStep, model: nn.Module, context: ModelContext, parameters: ParameterLayout) -> None:
        self._eager = eager
        self._context = context
        self._layout = parameters
        self._buffers = list(model.buffers())

    def parts(self, calls: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
        """What slices add to each `all_gather` of the step, (slices, ...), given what all ranks had gathered before."""
        collectives, num_slices = self._eager.collectives, len(batches[0].context.slices)
        tape = PlayingTape(calls)
        with self._elsewhere(), torch.enable_grad():
            reducer = SliceReducer(self._context, num_slices, self._layout, collectives)
            collectives.tape = tape
            try:
                self._eager.accumulate(batches, 0.0, reducer)
            finally:
                collectives.tape = None
        return [*tape.parts, *reducer.parts]

    @contextmanager
    def _elsewhere(self) -> Iterator[None]:
        context, parameters = self._context, self._layout.parameters
        buffers = [buffer.clone() for buffer in self._buffers]
        places = [(parameter.data, parameter.grad) for parameter in parameters]
        gradients = context.gradients
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        context.elsewhere = True
        try:
            yield
        finally:
            context.elsewhere, context.gradients = False, gradients
            for parameter, (data, grad) in zip(parameters, places, strict=True):
                parameter.data, parameter.grad = data, grad
            for buffer, before in zip(self._buffers, buffers, strict=True):
                buffer.copy_(before)
