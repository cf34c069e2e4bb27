"""Initial weights whose every bit is defined: what torch draws, to rounding, from the same integers of its generator.

torch's own have other last bits on another processor: its uniform numbers by whether a product and a sum are rounded
together, its normal ones by the instructions that their logarithms and cosines are computed with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.accel.compiled import compiled
from dist_train.accel.defined_functions import cos_of_turns, log_of

Array = np.ndarray[Any, Any]

_ATEN = torch.ops.aten
_BITS, _WIDE_BITS = 24, 53
# torch draws so many normal numbers at once: the first half by cosines, the second by sines of the same angles.
_BLOCK = 16


class InitialValues(TorchDispatchMode):
    """Inside the block, `uniform_` and `normal_` of float32 tensors on the CPU are those of this file.

    The generator must have been seeded since it drew a normal number: torch keeps one of two for the next call, and
    this block keeps its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: float | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {_ATEN.uniform_.default: self._uniform, _ATEN.normal_.default: self._normal}.get(func)
        if known is None or args[0].dtype != torch.float32 or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        tensor, *limits = args
        found = known(tensor.numel(), *limits, **kwargs)
        return tensor.copy_(torch.from_numpy(found).view(tensor.shape))

    def _uniform(self, count: int, low: float = 0.0, high: float = 1.0, *, generator: Generator | None = None) -> Array:
        """low + u * (high - low), (count,) float64, limits and their distance rounded to float32."""
        first, last = np.float32(low), np.float32(high)
        return first + _drawn(count, _BITS, generator) * np.float64(last - first)

    def _normal(self, count: int, mean: float = 0.0, std: float = 1.0, *, generator: Generator | None = None) -> Array:
        """Of Box and Muller (1958), (count,) float64."""
        if count < _BLOCK:
            found = np.array([self._next_normal(generator) for _ in range(count)], np.float64)
        else:
            drawn = _drawn(count, _BITS, generator)
            whole = count - count % _BLOCK
            found = np.empty(count)
            _normal_blocks(drawn[:whole], found[:whole])
            if whole < count:  # the last block is drawn anew, and covers numbers of the one before
                _normal_blocks(_drawn(_BLOCK, _BITS, generator), found[-_BLOCK:])
        return found * std + mean

    def _next_normal(self, generator: Generator | None) -> float:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        angle, radius = (_drawn(1, _WIDE_BITS, generator) for _ in range(2))
        first, self._kept = _pair(1.0 - radius[0], angle[0])
        return first


def _drawn(count: int, bits: int, generator: Generator | None) -> Array:
    """Uniform multiples of 2**-bits in [0, 1), (count,) float64."""
    return torch.empty(count, dtype=torch.int64).random_(0, 2**bits, generator=generator).numpy() * 2.0**-bits


@compiled
def _pair(of_radius: float, turns: float) -> tuple[float, float]:
    radius = np.sqrt(-2.0 * log_of(of_radius))
    return radius * cos_of_turns(turns), radius * cos_of_turns(turns - 0.25)


@compiled
def _normal_blocks(drawn: Array, out: Array) -> None:
    half = _BLOCK // 2
    for begin in range(0, len(drawn), _BLOCK):
        for place in range(begin, begin + half):
            radius, turns = np.sqrt(-2.0 * log_of(1.0 - drawn[place])), drawn[place + half]
            out[place] = radius * cos_of_turns(turns)
            out[place + half] = radius * cos_of_turns(turns - 0.25)
