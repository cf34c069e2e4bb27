"""The forward and backward pass of a step, computed a second time in other memory, without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import ModelContext, SliceGradients
from dist_train.execution.audit.tape import PlayingTape
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.execution.reducers import SliceReducer
from dist_train.training.protocols import Batch
from dist_train.training.step import EagerStep


class SecondComputation:
    """Computes slices of a step again: weights, gradients and what is between them are elsewhere than the first time.

    That memory is kept from one call to the next. Frozen weights and the rows of the table are not copied. Gradients,
    buffers and parameters are afterwards what they were.
    """

    def __init__(self, eager: EagerStep, model: nn.Module, context: ModelContext, parameters: FlatParameters) -> None:
        self._eager = eager
        self._context = context
        self._layout = parameters
        self._buffers = list(model.buffers())
        self._values = parameters.zeros()
        self._views = parameters.views(self._values)
        self._made: tuple[SliceReducer, SliceGradients | None, list[Tensor | None]] | None = None

    def parts(self, calls: Sequence[Tensor], batches: Sequence[Batch], values: Tensor | None = None) -> list[Tensor]:
        """What slices add to each `all_gather` of a step, (slices, ...), given what all ranks had gathered before.

        `values`: the flat weights of that step; None: as they are now. The last two are good until the next call.
        """
        collectives, tape = self._eager.collectives, PlayingTape(calls)
        with self._elsewhere(self._layout.values if values is None else values), torch.enable_grad():
            reducer = self._reducer(len(batches[0].context.slices))
            collectives.tape = tape
            try:
                self._eager.accumulate(batches, 0.0, reducer)
            finally:
                collectives.tape = None
        return [*tape.parts, *reducer.parts]

    def _reducer(self, num_slices: int) -> SliceReducer:
        parameters = self._layout.parameters
        if self._made is None:
            made = SliceReducer(self._context, num_slices, self._layout, self._eager.collectives)
            self._made = made, self._context.gradients, [parameter.grad for parameter in parameters]
        reducer, self._context.gradients, grads = self._made
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        return reducer

    @contextmanager
    def _elsewhere(self, values: Tensor) -> Iterator[None]:
        context, parameters = self._context, self._layout.parameters
        buffers = [buffer.clone() for buffer in self._buffers]
        places = [(parameter.data, parameter.grad) for parameter in parameters]
        gradients = context.gradients
        self._values.copy_(values)
        for parameter, view in zip(parameters, self._views, strict=True):
            parameter.grad = None
            parameter.data = view
        context.elsewhere = True
        try:
            yield
        finally:
            context.elsewhere, context.gradients = False, gradients
            for parameter, (data, grad) in zip(parameters, places, strict=True):
                parameter.data, parameter.grad = data, grad
            for buffer, before in zip(self._buffers, buffers, strict=True):
                buffer.copy_(before)
