"""Faster implementations for one machine, each equal to what it replaces; they step aside where they do not apply."""

from __future__ import annotations

import torch
from torch import nn

from dist_train.determinism.batch_context import ModelContext


def accelerate(model: nn.Module, context: ModelContext, device: torch.device) -> nn.Module:
    """Let the parts of a prepared model that have a faster implementation on this device use it, in place.

    state_dict keys do not change, outputs agree to rounding, and masks of dropout are the same bits.
    """
    if device.type == "cpu":
        from dist_train.accel.cpu_ensemble import fuse_ensembles
        from dist_train.accel.cpu_mlp import fuse_sequences  # imports numba, which takes a while
        from dist_train.accel.cpu_piecewise_linear import fuse_piecewise_linear

        fuse_sequences(model, context)
        fuse_ensembles(model, context)
        fuse_piecewise_linear(model)
    return model
