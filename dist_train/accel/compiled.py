"""Functions over numpy arrays, compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """The function as machine code, for each combination of argument types when it is first called with it.

    The code is kept beside the source or in the user's cache folder for the next process; where neither can be written,
    each process compiles anew. Floating-point operations are done one by one in the order of the source: the same bits
    on every processor.
    """
    try:
        return cast(F, numba.njit(cache=True)(function))
    except RuntimeError:  # no folder to keep it in
        return cast(F, numba.njit(function))
