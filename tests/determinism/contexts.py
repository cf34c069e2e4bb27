"""Contexts for tests that call modules on their own."""

from __future__ import annotations

from torch import Tensor, nn

from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.execution.flat_parameters import FlatParameters


def context_at(epoch: int = 0, first_row: int = 0, slices: tuple[int, ...] = (), seed: int = 0) -> ModelContext:
    """A context whose batch stays bound."""
    context = ModelContext(seed)
    context.bound(BatchContext(epoch, first_row, slices)).__enter__()
    return context


def keep_gradients(context: ModelContext, model: nn.Module, num_slices: int) -> Tensor:
    """Let the modules of a model keep the gradient of each slice apart, (slices, size)."""
    parameters = FlatParameters(p for p in model.parameters() if p.requires_grad)
    flat = parameters.zeros(num_slices)
    context.gradients = [{p: parameters.view(own, p) for p in parameters.parameters} for own in flat]
    return flat
