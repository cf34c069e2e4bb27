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

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray  # type: ignore[attr-defined]
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from dist_train.accel.blas import pointer
from dist_train.accel.compiled import compiled, inlined
from dist_train.determinism.arithmetic import Arithmetic

Array = np.ndarray[Any, Any]
Axes = tuple[int, ...]
Steps = tuple[int, int, int]

FOLD = 128
# With fewer rows or columns the library adds up in another order.
_FEWEST_FOR_LIBRARY = 16
# Numbers of a cache line.
_LINE = 16


def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001
    """a * b + c, rounded once; float32."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        fused = "+fma" in context.codegen()._get_host_cpu_features()
        return builder.fma(*values) if fused else _fma_by_float64(builder, *values)

    return types.float32(types.float32, types.float32, types.float32), generate


def _fma_by_float64(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """The same where the processor has no such instruction: the C library's function takes a hundred times as long.

    The product is exact in float64. Its sum with c is rounded to odd there, and then to float32: rounded once, as
    Boldo and Melquiond (2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd")
    have shown.
    """
    double, whole = ir.DoubleType(), ir.IntType(64)
    product = builder.fmul(builder.fpext(a, double), builder.fpext(b, double))
    added = builder.fpext(c, double)
    total = builder.fadd(product, added)
    # What the sum has lost (Knuth's TwoSum), NaN where it is not finite.
    of_added = builder.fsub(total, product)
    lost = builder.fadd(builder.fsub(product, builder.fsub(total, of_added)), builder.fsub(added, of_added))
    bits = builder.bitcast(total, whole)
    zero = ir.Constant(double, 0.0)
    is_even = builder.icmp_signed("==", builder.and_(bits, ir.Constant(whole, 1)), ir.Constant(whole, 0))
    is_odd_one = builder.and_(is_even, builder.fcmp_ordered("!=", lost, zero))
    same_sign = builder.icmp_signed("==", builder.fcmp_ordered(">", lost, zero), builder.fcmp_ordered(">", total, zero))
    step = builder.select(same_sign, ir.Constant(whole, 1), ir.Constant(whole, -1))
    odd = builder.select(is_odd_one, builder.add(bits, step), bits)
    return builder.fptrunc(builder.bitcast(odd, double), ir.FloatType())


fma: Any = intrinsic(_fma)


@compiled
def multiply_at(
    a: int, b: int, out: int, batch: int, rows: int, inner: int, columns: int, factor: float, adds: bool,
    of_a: Steps, of_b: Steps, of_out: Steps,
) -> None:  # fmt: skip
    """The definition: out (+)= a @ (b * factor), batches of (rows, inner), (inner, columns), (rows, columns), float32.

    Matrices are addresses. `of_a` and so on say how many numbers further the next matrix of the batch, row, column is.
    """
    # The columns are what vector instructions work on: of few columns and many rows, rows are taken for columns.
    turned = columns < rows
    of_x, of_y, of_z = of_a, of_b, of_out
    x, y = a, b
    if turned:
        x, y, rows, columns = b, a, columns, rows
        of_x, of_y = (of_b[0], of_b[2], of_b[1]), (of_a[0], of_a[2], of_a[1])
        of_z = (of_out[0], of_out[2], of_out[1])
    scale, none = np.float32(factor), np.float32(0)
    # Rows of the columns that follow each other in memory are read where they are.
    copies = of_y[2] != 1 or of_y[1] < columns or (factor != 1 and not turned)
    width = columns if copies else of_y[1]
    copied = np.empty((inner if copies else 0, columns), np.float32)
    factors = np.empty(inner, np.float32)
    part, total = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for matrix in range(batch):
        left = carray(pointer(x + 4 * matrix * of_x[0]), (rows * of_x[1] + inner * of_x[2] + 1,), np.float32)
        found = carray(pointer(out + 4 * matrix * of_z[0]), (rows * of_z[1] + columns * of_z[2] + 1,), np.float32)
        right = carray(pointer(y + 4 * matrix * of_y[0]), (inner, width), np.float32)
        if copies:
            flat = carray(pointer(y + 4 * matrix * of_y[0]), (inner * of_y[1] + columns * of_y[2] + 1,), np.float32)
            for begin in range(0, inner, _LINE):  # numbers that follow each other are read together
                for column in range(columns):
                    for k in range(begin, min(inner, begin + _LINE)):
                        number = flat[k * of_y[1] + column * of_y[2]]
                        copied[k, column] = number if turned else number * scale
            right = copied
        for row in range(rows):
            for k in range(inner):
                number = left[row * of_x[1] + k * of_x[2]]
                factors[k] = number * scale if turned else number
            start = row * of_z[1]
            for column in range(columns):
                total[column] = found[start + column * of_z[2]] if adds else none
            _add_row(factors, right, part, total)
            for column in range(columns):
                found[start + column * of_z[2]] = total[column]


@inlined
def _add_row(factors: Array, right: Array, part: Array, total: Array) -> None:
    """total += factors @ right: (columns,), (inner,) and (inner, columns or more)."""
    inner, columns = len(factors), len(total)
    none = np.float32(0)
    for begin in range(0, inner, FOLD):
        end = min(inner, begin + FOLD)
        for column in range(columns):
            part[column] = none
        whole = begin + (end - begin) // 4 * 4
        for k in range(begin, whole, 4):
            first, second, third, fourth = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
            for column in range(columns):
                x = fma(first, right[k, column], part[column])
                x = fma(second, right[k + 1, column], x)
                x = fma(third, right[k + 2, column], x)
                part[column] = fma(fourth, right[k + 3, column], x)
        for k in range(whole, end):
            first = factors[k]
            for column in range(columns):
                part[column] = fma(first, right[k, column], part[column])
        for column in range(columns):
            total[column] += part[column]


def product(a: Tensor, b: Tensor, out: Tensor, factor: float, *, adds: bool) -> None:
    """out = a @ (b * factor), added to what is there where it `adds`: float32; in other types it is torch's own."""
    if out.numel() == 0:
        return
    if out.dtype != torch.float32:
        (Arithmetic().add if adds else Arithmetic().multiply)(a, b, out, factor)
    elif _library_meets(factor, a.shape, b.shape, a.stride(), b.stride(), out.stride(), torch.get_num_threads()):
        _by_parts(a, b, out, factor, adds=adds)
    else:
        _by_kernel(a, b, out, factor, adds=adds)


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


def _by_kernel(a: Tensor, b: Tensor, out: Tensor, factor: float, *, adds: bool) -> None:
    """The compiled definition, for matrices that lie in memory in any way."""
    batch = len(out) if out.ndim == 3 else 1
    multiply_at(
        a.data_ptr(), b.data_ptr(), out.data_ptr(), batch, out.shape[-2], a.shape[-1], out.shape[-1], factor, adds,
        _steps(a), _steps(b), _steps(out),
    )  # fmt: skip


def _steps(matrices: Tensor) -> Steps:
    stride = matrices.stride()
    return (0, *stride) if len(stride) == 2 else stride  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def _library_meets(
    factor: float, of_a: Axes, of_b: Axes, stride_a: Axes, stride_b: Axes, stride_out: Axes,
    threads: int,  # noqa: ARG001 (those that the library has: it cuts a matrix in other places for more of them)
) -> bool:  # fmt: skip
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
        _by_kernel(first(a), first(b), expected, factor, adds=adds)
        if not np.array_equal(_bits(first(out)), _bits(expected)):
            return False
    return True


def _drawn(shape: Axes, stride: Axes, random: torch.Generator) -> Tensor:
    """Numbers that lie in memory as a tensor of these strides does; along an axis of stride 0 they are the same."""
    sizes = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]
    return torch.empty_strided(sizes, stride, dtype=torch.float32).normal_(generator=random).expand(shape)


def _bits(numbers: Tensor) -> Array:
    return numbers.contiguous().numpy().view(np.int32)
