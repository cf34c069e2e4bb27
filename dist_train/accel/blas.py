"""torch's own single-precision matrix product, for compiled functions to call."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_NAME = "dist_train_sgemm"


def _load() -> bool:
    """Give the product a name under which compiled code finds it; whether torch has one to offer."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(library.sgemm_, ctypes.c_void_p).value
    except (OSError, AttributeError):  # another system, or a build whose BLAS keeps its names to itself
        return False
    llvmlite.binding.add_symbol(_NAME, address)
    return True


AVAILABLE = _load()
"""Whether `sgemm` may be called: where torch is built with MKL it exports the product."""


def _sgemm(
    typing_context: Any, transpose_a: Any, transpose_b: Any, m: Any, n: Any, k: Any, alpha: Any,  # noqa: ARG001
    a: Any, lda: Any, b: Any, ldb: Any, beta: Any, c: Any, ldc: Any,  # noqa: ARG001
) -> Any:  # fmt: skip
    """BLAS's SGEMM, matrices by columns: c = alpha * op(a) @ op(b) + beta * c.

    `transpose_a` and `transpose_b` are booleans, `a`, `b`, `c` addresses of float32 numbers, the rest is as in BLAS.
    It takes as many threads as torch does.
    """
    flag, size, number, address = types.boolean, types.int32, types.float32, types.uintp
    kinds = (flag, flag, size, size, size, number, address, size, address, size, number, address, size)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        def passed(kind: Any, value: Any) -> Any:
            if kind == address:
                return builder.inttoptr(value, ir.IntType(8).as_pointer())
            if kind == flag:
                letters = (ir.Constant(ir.IntType(8), ord(letter)) for letter in "TN")
                value = builder.select(builder.trunc(value, ir.IntType(1)), *letters)
            return builder.bitcast(cgutils.alloca_once_value(builder, value), ir.IntType(8).as_pointer())

        arguments = [passed(kind, value) for kind, value in zip(kinds, values, strict=True)]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()] * len(arguments))
        builder.call(cgutils.get_or_insert_function(builder.module, kind, _NAME), arguments)
        return context.get_dummy_value()

    return types.void(*kinds), generate


sgemm: Any = intrinsic(_sgemm)


def _pointer(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    """An address as what numba.carray takes."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


pointer: Any = intrinsic(_pointer)
