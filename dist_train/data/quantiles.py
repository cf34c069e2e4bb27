"""Exact quantiles of a column that lies in pieces on several ranks, from integer counts alone.

A radix selection: float64 values map to 64-bit keys of the same order, and four passes find the wanted keys 16 bits at
a time, each counting the next digit among the keys that share the digits found so far with a wanted one. Counts add up
to the same integers in whichever pieces the column comes, so the result is the same number for every world size, in
bounded memory. All 64 bits matter: in float32 timestamps a minute apart are one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DIGITS = 1 << 16
_SIGN_BIT = torch.iinfo(torch.int64).min


def exact_quantiles(values: Tensor, fractions: Sequence[float], add_up: Callable[[Tensor], Tensor]) -> Tensor:
    """Quantiles (linear interpolation) of the values of all ranks, as float64, (len(fractions),).

    `values` is this rank's piece, (n,), without NaN; neighbours must not lie further apart than float64 reaches.
    `add_up` sums an int64 tensor over ranks. NaN when no rank has any value.
    """
    total = int(add_up(torch.tensor([len(values)])))
    if total == 0:
        return torch.full((len(fractions),), float("nan"), dtype=torch.float64)
    places = torch.tensor([f * (total - 1) for f in fractions], dtype=torch.float64)
    neighbours = torch.cat([places.floor(), places.ceil()]).long()
    below, above = _order_statistics(values.double(), neighbours, add_up).view(2, -1).unbind()
    return below + (above - below) * (places - places.floor())


def _order_statistics(values: Tensor, wanted: Tensor, add_up: Callable[[Tensor], Tensor]) -> Tensor:
    """The values at the places `wanted` in the order of all ranks' values."""
    keys = _ordered_keys(values)
    found = torch.zeros_like(wanted)
    # Keys that share all digits so far are a group: that of each key still in play, that of each wanted one.
    group, wanted_group = torch.zeros_like(keys), torch.zeros_like(wanted)
    for shift in (48, 32, 16, 0):
        num_groups = int(wanted_group.max()) + 1
        # The mask takes away the copies of the sign that a right shift brings in.
        cells = group * _DIGITS + ((keys >> shift) & (_DIGITS - 1))
        counts = add_up(torch.bincount(cells, minlength=num_groups * _DIGITS)).view(num_groups, _DIGITS)
        ends = counts.cumsum(1)
        digits = torch.searchsorted(ends[wanted_group], wanted.unsqueeze(1), right=True).squeeze(1)
        wanted = wanted - (ends - counts)[wanted_group, digits]
        found = found | (digits << shift)
        wanted_cells, wanted_group = torch.unique(wanted_group * _DIGITS + digits, return_inverse=True)
        kept = torch.isin(cells, wanted_cells)
        keys, group = keys[kept], torch.searchsorted(wanted_cells, cells[kept])
    return _values_of(found)


def _ordered_keys(values: Tensor) -> Tensor:
    """Keys in the order of the values when read as unsigned: positive numbers get the sign bit, negative ones flip."""
    bits = values.view(torch.int64)
    return bits ^ ((bits >> 63) | _SIGN_BIT)


def _values_of(keys: Tensor) -> Tensor:
    return (keys ^ (~(keys >> 63) | _SIGN_BIT)).view(torch.float64)
