"""`train.precision` as types of torch."""

from __future__ import annotations

import torch


def dtype_of(precision: str) -> torch.dtype:
    """Type of weights and features; under `bf16` both stay float32 and the forward pass runs under autocast."""
    return torch.float64 if precision == "float64" else torch.float32


def autocast_dtype_of(precision: str) -> torch.dtype | None:
    """Type that the forward pass computes in under autocast; None: no autocast."""
    return torch.bfloat16 if precision == "bf16" else None
