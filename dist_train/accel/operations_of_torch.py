"""Defined operations in the place of those that torch's modules and autograd call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.accel.defined_products import product

_ATEN = torch.ops.aten


class OperationsOfTorch(TorchDispatchMode):
    """Inside the block, matrix products, forward and backward, BatchNorm in evaluation and addcmul are defined ones.

    So they are in float32 on the CPU; all else is torch's.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = _OPERATIONS.get(func)
        if operation is None or args[0].dtype != torch.float32 or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        return operation(func, args, kwargs)


def _product(_: Any, args: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Tensor:
    *begun, a, b = (x.detach() for x in args)
    out = a.new_empty((*a.shape[:-1], b.shape[-1]))
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if begun and alpha == beta == 1:
        product(a, b, out.copy_(begun[0]), 1.0, adds=True)
        return out
    product(a, b, out, 1.0, adds=False)
    if begun:
        out.mul_(alpha)
        if beta != 0:  # as torch, which does not read it then: it may be NaN
            out.add_(begun[0] * beta)
    return out


def _batch_norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """x * scale + shift, each rounded once; both factors are made in float64."""
    x, weight, bias, mean, var, training, _, eps = args
    if training:
        return func(*args, **kwargs)
    scale = 1 / (var.detach().double() + eps).sqrt()
    if weight is not None:
        scale *= weight.detach()
    shift = -mean.double() * scale if bias is None else bias.detach() - mean.double() * scale
    axes = (-1, *[1] * (x.ndim - 2))
    out = (x.detach() * scale.float().view(axes)).add_(shift.float().view(axes))
    return out, x.new_empty(0), x.new_empty(0)


def _addcmul(_: Any, args: Sequence[Tensor], kwargs: Mapping[str, Any]) -> Tensor:
    """The product, then the sum: torch rounds once or twice, as the processor has it."""
    added, a, b = (x.detach() for x in args)
    found: Tensor = a * b
    value = kwargs.get("value", 1)
    return (found if value == 1 else found * value) + added


_OPERATIONS: Mapping[Any, Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]] = {
    _ATEN.mm.default: _product,
    _ATEN.bmm.default: _product,
    _ATEN.addmm.default: _product,
    _ATEN.baddbmm.default: _product,
    _ATEN.native_batch_norm.default: _batch_norm,
    _ATEN.addcmul.default: _addcmul,
}
