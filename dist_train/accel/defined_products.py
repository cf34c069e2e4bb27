"""Matrix products whose every bit is defined, whatever the processor, the library, or the rows beside a row.

An element of a product is a sum over the inner axis. It is cut every FOLD terms; each part is a chain of fused
multiply-adds in the order of the axis, begun with 0; the parts are added up in order, to what is there already if the
product is added to something. Nothing else decides a bit: neither the number of rows nor their place in memory.
RepDL (https://github.com/microsoft/RepDL) defines its products by such chains as well.

On processors with AVX2 or AVX-512 torch's library computes a part of 128 terms by this very chain, unless the product
has few rows or columns. So the library is asked for one part after the other where its bits were compared with those
of the definition, for the shape at hand; elsewhere the product is compiled code of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.accel.compiled import compiled
from dist_train.accel.defined_functions import softmax
from dist_train.determinism.products import Products

Array = np.ndarray[Any, Any]

FOLD = 128
# With fewer rows or columns the library adds up in another order.
_FEWEST_FOR_LIBRARY = 16


def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001
    """a * b + c, rounded once; float32."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        return builder.fma(*values)

    return types.float32(types.float32, types.float32, types.float32), generate


fma: Any = intrinsic(_fma)


@compiled
def multiply_into(a: Array, b: Array, out: Array, adds: bool) -> None:
    """The definition: out (+)= a @ b; (m, k), (k, n), (m, n), each contiguous, float32."""
    rows, inner = a.shape
    columns = b.shape[1]
    none = np.float32(0)
    part = np.empty(columns, np.float32)
    for row in range(rows):
        if not adds:
            for column in range(columns):
                out[row, column] = none
        for begin in range(0, inner, FOLD):
            end = min(inner, begin + FOLD)
            for column in range(columns):
                part[column] = none
            whole = begin + (end - begin) // 4 * 4
            for k in range(begin, whole, 4):
                first, second, third, fourth = a[row, k], a[row, k + 1], a[row, k + 2], a[row, k + 3]
                for column in range(columns):
                    x = fma(first, b[k, column], part[column])
                    x = fma(second, b[k + 1, column], x)
                    x = fma(third, b[k + 2, column], x)
                    part[column] = fma(fourth, b[k + 3, column], x)
            for k in range(whole, end):
                first = a[row, k]
                for column in range(columns):
                    part[column] = fma(first, b[k, column], part[column])
            for column in range(columns):
                out[row, column] += part[column]


@compiled
def multiply_all_into(a: Array, b: Array, out: Array, adds: bool) -> None:
    """`multiply_into` of each matrix of a batch, (batch, ...) each."""
    for index in range(len(out)):
        multiply_into(a[index], b[index], out[index], adds)


class DefinedProducts(Products):
    """Products by the definition above, float32 on the CPU; in other types they are torch's own."""

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """out = a @ (b * factor)."""
        _product(a, b, out, factor, adds=False)

    def add(self, a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """out += a @ (b * factor)."""
        _product(a, b, out, factor, adds=True)

    def of_torch(self) -> AbstractContextManager[object]:
        """Inside the block, what torch's modules and autograd multiply is multiplied in this way."""
        return _OfTorch(self)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax of `defined_functions`; of an ensemble, its members are added up in their order."""
        found = torch.from_numpy(softmax(logits.detach().numpy()))
        if found.ndim == 2:
            return found
        first, *others = found.unbind(1)
        total = first.clone()
        for member in others:
            total += member
        return total / (1 + len(others))


def _product(a: Tensor, b: Tensor, out: Tensor, factor: float, *, adds: bool) -> None:
    if out.numel() == 0:
        return
    if out.dtype != torch.float32:
        (Products().add if adds else Products().multiply)(a, b, out, factor)
    elif _library_meets(factor, *_layout(a, b, out)):
        _by_parts(a, b, out, factor, adds=adds)
    elif factor != 1:
        _product(a, b * factor, out, 1.0, adds=adds)
    else:
        _by_kernel(a, b, out, adds=adds)


def _by_parts(a: Tensor, b: Tensor, out: Tensor, factor: float, *, adds: bool) -> None:
    """The library's products of FOLD terms, one after the other."""
    inner, batched = a.shape[-1], out.ndim == 3
    if inner == 0 and not adds:
        out.zero_()
    for begin in range(0, inner, FOLD):
        beta = 1 if adds or begin else 0
        part = (a, b) if inner <= FOLD else (a[..., begin : begin + FOLD], b[..., begin : begin + FOLD, :])
        if batched:
            out.baddbmm_(*part, beta=beta, alpha=factor)
        else:
            out.addmm_(*part, beta=beta, alpha=factor)


def _by_kernel(a: Tensor, b: Tensor, out: Tensor, *, adds: bool) -> None:
    if out.shape[-1] < out.shape[-2]:  # the columns are what vector instructions work on
        a, b, out = b.mT, a.mT, out.mT
    result = out if out.is_contiguous() else out.contiguous()
    multiply = multiply_into if out.ndim == 2 else multiply_all_into
    multiply(_read(a), _read(b), result.numpy(), adds)
    if result is not out:
        out.copy_(result)


def _read(numbers: Tensor) -> Array:
    """A view. The memory stays resizable, as it does not by `numpy()`: fully_shard frees gathered weights so."""
    return np.from_dlpack(numbers.detach().contiguous())


Axes = tuple[int, ...]


def _layout(a: Tensor, b: Tensor, out: Tensor) -> tuple[Axes, ...]:
    return tuple(a.shape), tuple(b.shape), a.stride(), b.stride(), out.stride()


@lru_cache(maxsize=4096)
def _library_meets(factor: float, of_a: Axes, of_b: Axes, stride_a: Axes, stride_b: Axes, stride_out: Axes) -> bool:
    """Whether the library has the bits of the definition for such matrices; of a batch, for the first one."""
    if min(of_a[-2], of_b[-1]) < _FEWEST_FOR_LIBRARY:
        return False
    random = torch.Generator().manual_seed(0)
    a, b, out = (
        _drawn(shape, stride, random)
        for shape, stride in ((of_a, stride_a), (of_b, stride_b), ((*of_a[:-1], of_b[-1]), stride_out))
    )
    first = (lambda x: x[0]) if out.ndim == 3 else (lambda x: x)
    expected = first(out).clone()
    for adds in (True, False):
        _by_parts(a, b, out, factor, adds=adds)
        _by_kernel(first(a), first(b) * factor, expected, adds=adds)
        if not np.array_equal(_bits(first(out)), _bits(expected)):
            return False
    return True


def _drawn(shape: Axes, stride: Axes, random: torch.Generator) -> Tensor:
    """Numbers that lie in memory as a tensor of these strides does; along an axis of stride 0 they are the same."""
    sizes = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]
    return torch.empty_strided(sizes, stride, dtype=torch.float32).normal_(generator=random).expand(shape)


def _bits(numbers: Tensor) -> Array:
    return numbers.contiguous().numpy().view(np.int32)


_ATEN = torch.ops.aten
_OPERATIONS = {_ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default, _ATEN.baddbmm.default}


class _OfTorch(TorchDispatchMode):
    """Replaces the products that torch's operations consist of, forward and backward."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _OPERATIONS or args[-1].dtype != torch.float32 or args[-1].device.type != "cpu":
            return func(*args, **kwargs)
        *begun, a, b = (x.detach() for x in args)
        out = a.new_empty((*a.shape[:-1], b.shape[-1]))
        if not begun:
            self._products.multiply(a, b, out)
        elif kwargs.get("alpha", 1) == kwargs.get("beta", 1) == 1:
            self._products.add(a, b, out.copy_(begun[0]))
        else:
            self._products.multiply(a, b, out)
            out.mul_(kwargs.get("alpha", 1)).add_(begun[0] * kwargs.get("beta", 1))
        return out
