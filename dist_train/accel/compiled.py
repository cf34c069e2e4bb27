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

    A change of the function's own file makes what is kept invalid; numba does not notice a change of another file whose
    functions it calls (remove `__pycache__` then).
    """
    try:
        return cast(F, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # no folder to keep it in
        return cast(F, numba.njit(error_model="numpy")(function))


def inlined(function: F) -> F:
    """The function as part of each compiled function that calls it; it is not compiled by itself."""
    return cast(F, numba.njit(inline="always")(function))
