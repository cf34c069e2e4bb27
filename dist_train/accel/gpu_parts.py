"""The two parts of a float32 number that TF32x3 multiplies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def high_part(x):
    """The part of float32 numbers that TF32 holds, 11 significant bits; numbers minus that part have 13."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
