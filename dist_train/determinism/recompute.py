"""Gradient checkpointing: layers whose inside is computed again in the backward pass instead of being kept.

Chen, Xu, Zhang and Guestrin (2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_train.determinism.batch_context import ModelContext
from dist_train.errors import UserError


def recompute_layers(model: nn.Module, context: ModelContext, name: str) -> nn.Module:
    """Keep of each layer of a model its inputs alone, in place; `name` is what the message calls it.

    Masks of dropout are functions of the batch's place, which is bound again for the second computation, so the
    gradients are the same bits. No random generator is saved or set back: none is used.

    Raises:
        UserError: the model has no layers.
    """
    layers = list(layers_of(model))
    if not layers:
        raise UserError(
            f"train.gradient_checkpointing: {name} has no nn.ModuleList of layers that could be computed again: set it "
            "to false"
        )
    for layer in layers:
        layer.forward = _recomputed(layer, layer.forward, context)
    return model


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The members of every nn.ModuleList that is not inside another one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers_of(child)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], context: ModelContext) -> Callable[..., Any]:
    def kept_by_inputs(*inputs: Any, **settings: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*inputs, **settings)
        batch = context.batch

        def compute(*inputs: Any, **settings: Any) -> Any:
            with context.bound(batch):
                return forward(*inputs, **settings)

        return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False, **settings)

    return kept_by_inputs
