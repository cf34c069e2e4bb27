"""Exact order statistics of numbers that lie in pieces, in files and on several ranks, from integer counts alone.

A radix selection: numbers map to 64-bit keys of the same order, and a few passes find the wanted keys some bits at a
time, each counting the next digit among the keys that share the digits found so far with a wanted one. Counts add up
to the same integers in whichever pieces the numbers come, so the result is the same for every world size, in bounded
memory. All 64 bits matter: in float32 timestamps a minute apart are one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dist_train.distributed.collectives import Collectives

# Counts of one digit take 64 KiB for each wanted key.
_BITS = 13
_DIGITS = 1 << _BITS
_SHIFTS = [max(0, 64 - _BITS * n) for n in range(1, -(-64 // _BITS) + 1)]
_SIGN_BIT = torch.iinfo(torch.int64).min

Keys = Callable[[], Iterable[Sequence[tuple[Tensor, "Tensor | int"]]]]
"""This rank's piece, in parts, as often as it is asked for. A part holds keys, (n,) int64 ordered as unsigned, with the
group of each of them or of all; several times."""


def exact_quantiles(
    pieces: Callable[[], Iterable[Sequence[Tensor]]],
    num_columns: int,
    fractions: Sequence[float],
    collectives: Collectives,
) -> tuple[Tensor, Tensor]:
    """Quantiles (linear interpolation) of columns over the rows of all ranks, float64, (num_columns, fractions).

    `pieces` gives this rank's rows, in parts, as often as it is asked: float64 columns (n,), NaN where there is no
    value; neighbours must not lie further apart than float64 reaches. Also returned: how many values each column has,
    (num_columns,). Quantiles of none are NaN. Raises Stopped when the ranks have agreed to stop.
    """
    shares = torch.tensor(fractions, dtype=torch.float64)
    present = torch.zeros(num_columns, dtype=torch.int64)

    def keys() -> Iterator[list[tuple[Tensor, Tensor | int]]]:
        missing.zero_()
        for piece in pieces():
            part: list[tuple[Tensor, Tensor | int]] = []
            for index, column in enumerate(piece):
                holes = column.isnan()
                num_holes = int(holes.count_nonzero())
                missing[index] += num_holes
                # NaN with its sign unset comes after all numbers.
                values = column.masked_fill(holes, float("nan")) if num_holes else column
                part.append((_ordered_keys(values), index))
            yield part

    missing = torch.zeros_like(present)

    def places(totals: Tensor) -> Tensor:
        present.copy_(totals - collectives.all_reduce(missing.clone()))
        exact = shares * (present - 1).clamp(min=0).unsqueeze(1)
        return torch.cat([exact.floor(), exact.ceil()], 1).long()

    found = order_statistics(keys, num_columns, places, collectives)
    below, above = _values_of(found).view(num_columns, 2, len(fractions)).unbind(1)
    exact = shares * (present - 1).unsqueeze(1)
    quantiles = below + (above - below) * (exact - exact.floor())
    return quantiles.masked_fill((present == 0).unsqueeze(1), float("nan")), present


def order_statistics(
    keys: Keys, num_groups: int, places: Callable[[Tensor], Tensor], collectives: Collectives
) -> Tensor:
    """Keys at given places in the order of each group over all ranks, (num_groups, places).

    `places` is told the sizes of the groups, (num_groups,), and says which places are wanted of each, (num_groups, n).
    In an empty group what is found means nothing.
    """
    tables: list[Tensor] = []  # for each digit found so far: cell (of the digit before) and digit -> cell, or -1
    num_cells = num_groups
    wanted = torch.empty(0, dtype=torch.int64)
    for shift in _SHIFTS:
        counts = torch.zeros(num_cells * _DIGITS, dtype=torch.int64)
        collectives.lockstep(_counting(keys, tables, shift, counts))
        counts = collectives.all_reduce(counts).view(num_cells, _DIGITS)
        if not tables:
            of_groups = places(counts.sum(1))
            wanted = of_groups.flatten()
            cells = torch.arange(num_groups).repeat_interleave(of_groups.shape[1])
            found = torch.zeros_like(wanted)
        ends = counts.cumsum(1)
        digits = torch.searchsorted(ends[cells], wanted.unsqueeze(1), right=True).squeeze(1).clamp(max=_DIGITS - 1)
        wanted = wanted - (ends - counts)[cells, digits]
        found |= digits << shift
        chosen, cells = torch.unique(cells * _DIGITS + digits, return_inverse=True)
        table = torch.full((num_cells * _DIGITS,), -1)
        table[chosen] = torch.arange(len(chosen))
        tables.append(table)
        num_cells = len(chosen)
    return found.view(num_groups, -1)


def _counting(keys: Keys, tables: Sequence[Tensor], shift: int, counts: Tensor) -> Iterator[int]:
    for part in keys():
        num_keys = 0
        for of_part, cells in part:
            num_keys += len(of_part)
            of_cells = of_part
            for table, former in zip(tables, _SHIFTS, strict=False):
                cells = table.index_select(0, _digit(of_cells, former).add_(cells * _DIGITS))
                kept = (cells >= 0).nonzero().squeeze(1)
                of_cells, cells = of_cells.index_select(0, kept), cells.index_select(0, kept)
            places = _digit(of_cells, shift).add_(cells * _DIGITS)
            counts.scatter_add_(0, places, torch.ones_like(places))
        yield num_keys


def _digit(keys: Tensor, shift: int) -> Tensor:
    # The mask takes away the copies of the sign that a right shift brings in. The last digit is cut short by the shift
    # of the one before: its upper bits are those of a digit that is known, and do no harm.
    return (keys >> shift).bitwise_and_(_DIGITS - 1)


def _ordered_keys(values: Tensor) -> Tensor:
    """Keys in the order of the values when read as unsigned: positive numbers get the sign bit, negative ones flip."""
    bits = values.view(torch.int64)
    return (bits >> 63).bitwise_or_(_SIGN_BIT).bitwise_xor_(bits)


def _values_of(keys: Tensor) -> Tensor:
    return (keys ^ (~(keys >> 63) | _SIGN_BIT)).view(torch.float64)
