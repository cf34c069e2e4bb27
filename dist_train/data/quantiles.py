"""Exact quantiles of a column that lies in pieces on several ranks, from integer counts alone.

A radix selection: float32 values map to 32-bit keys of the same order; a first pass counts the upper 16 bits, a second
the lower 16 bits of those buckets in which a wanted value lies. Counts add up to the same integers in whichever pieces
the column comes, so the result is the same number for every world size, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BUCKETS = 1 << 16


def exact_quantiles(values: Tensor, fractions: Sequence[float], add_up: Callable[[Tensor], Tensor]) -> Tensor:
    """Quantiles (linear interpolation) of the float32-rounded values of all ranks, as float64, (len(fractions),).

    `values` is this rank's piece, (n,), without NaN; `add_up` sums an int64 tensor over ranks. NaN when no rank has
    any value.
    """
    keys = _ordered_keys(values.float())
    upper, lower = (keys >> 16) + _BUCKETS // 2, keys & (_BUCKETS - 1)
    counts = add_up(torch.bincount(upper, minlength=_BUCKETS))
    total = int(counts.sum())
    if total == 0:
        return torch.full((len(fractions),), float("nan"), dtype=torch.float64)
    places = torch.tensor([f * (total - 1) for f in fractions], dtype=torch.float64)
    wanted = torch.stack([places.floor(), places.ceil()]).long()  # (2, fractions): neighbours of each quantile

    ends = counts.cumsum(0)
    buckets = torch.searchsorted(ends, wanted, right=True)
    within = wanted - (ends[buckets] - counts[buckets])
    distinct, which = torch.unique(buckets, return_inverse=True)
    details = add_up(torch.stack([torch.bincount(lower[upper == b], minlength=_BUCKETS) for b in distinct.tolist()]))
    detail_ends = details.cumsum(1)[which.flatten()]
    low = torch.searchsorted(detail_ends, within.flatten().unsqueeze(1), right=True).view_as(within)

    below, above = _values_of(((buckets - _BUCKETS // 2) << 16) | low).double().unbind()
    return below + (above - below) * (places - places.floor())


def _ordered_keys(values: Tensor) -> Tensor:
    bits = values.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _values_of(keys: Tensor) -> Tensor:
    bits = keys.int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
