"""Exact order statistics of numbers that lie in pieces, in files and on several ranks, from integer counts alone.

A radix selection: numbers map to 64-bit keys of the same order, and a few passes find the wanted keys some bits at a
time, each counting the next digit among the keys that share the prefix found so far with a wanted one. Counts add up
to the same integers in whichever pieces the numbers come, so the result is the same for every world size, in bounded
memory. All 64 bits matter: in float32 timestamps a minute apart are one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.distributed.collectives import Collectives

# A digit has so many bits: many make few passes, few make small tables of counts.
_MOST_BITS, _FEWEST_BITS = 13, 4
# Counts of a pass: 32 MiB, and not many more than there are keys to count.
_MOST_COUNTS, _FEWEST_COUNTS = 1 << 22, 1 << 16
_SIGN_BIT = torch.iinfo(torch.int64).min
# Numbers that are sorted at once: 32 MiB.
_MOST_SORTED = 1 << 22

Keys = Callable[[], Iterable[Sequence[tuple[Tensor, "Tensor | int"]]]]
"""Gives this rank's keys in parts, anew at each call. A part is a sequence of (keys, groups): keys (n,) int64, ordered
as unsigned numbers; groups (n,) int64, or one group for all of them."""


def exact_quantiles(
    pieces: Callable[[], Iterable[Sequence[Tensor]]],
    num_columns: int,
    fractions: Sequence[float],
    collectives: Collectives,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantiles (linear interpolation) of columns over the rows of all ranks, float64, (num_columns, fractions).

    `pieces` gives this rank's rows, in parts, as often as it is asked: float64 columns (n,), NaN where there is no
    value; neighbours must not lie further apart than float64 reaches. Also returned: how many values each column has,
    (num_columns,). Quantiles of none are NaN. Raises Stopped when the ranks have agreed to stop.

    `num_rows`: rows over all ranks. Where they are few, they are sorted, with the same result.
    """
    shares = torch.tensor(fractions, dtype=torch.float64)
    if num_rows is not None and columns_to_sort(num_rows) >= num_columns:
        return _quantiles_of_sorted(pieces, num_columns, shares, collectives)
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

    return _interpolated(order_statistics(keys, num_columns, places, collectives), shares, present), present


def columns_to_sort(num_rows: int) -> int:
    """Columns of so many rows over all ranks that are few enough to be gathered and sorted at once."""
    return _MOST_SORTED // max(1, num_rows)


def _quantiles_of_sorted(
    pieces: Callable[[], Iterable[Sequence[Tensor]]], num_columns: int, shares: Tensor, collectives: Collectives
) -> tuple[Tensor, Tensor]:
    own = [torch.empty((0, num_columns), dtype=torch.float64)]

    def gather() -> Iterator[int]:
        for piece in pieces():
            own.append(torch.stack(list(piece), 1))
            yield len(own[-1])

    collectives.lockstep(gather())
    rows = torch.cat(list(collectives.all_gather_object(lambda: torch.cat(own))))
    present = len(rows) - rows.isnan().sum(0)
    if not len(rows):
        return torch.full((num_columns, len(shares)), float("nan"), dtype=torch.float64), present
    keys = _ordered_keys(rows.masked_fill(rows.isnan(), float("nan"))) ^ _SIGN_BIT
    exact = shares * (present - 1).clamp(min=0).unsqueeze(1)
    places = torch.cat([exact.floor(), exact.ceil()], 1).long()
    found = keys.t().contiguous().sort(1).values.gather(1, places) ^ _SIGN_BIT
    return _interpolated(found, shares, present), present


def _interpolated(found: Tensor, shares: Tensor, present: Tensor) -> Tensor:
    """Quantiles from the keys below and above each of them, (columns, 2 * shares)."""
    below, above = _values_of(found).view(len(present), 2, len(shares)).unbind(1)
    exact = shares * (present - 1).unsqueeze(1)
    quantiles = below + (above - below) * (exact - exact.floor())
    return quantiles.masked_fill((present == 0).unsqueeze(1), float("nan"))


def order_statistics(
    keys: Keys, num_groups: int, places: Callable[[Tensor], Tensor], collectives: Collectives
) -> Tensor:
    """Keys at given places in the order of each group over all ranks, (num_groups, places).

    `places` is told the sizes of the groups, (num_groups,), and says which places are wanted of each, (num_groups, n).
    In an empty group what is found means nothing.
    """
    digits: list[_Digit] = []  # those found so far
    num_prefixes, shift = num_groups, 64
    wanted = torch.empty(0, dtype=torch.int64)
    total = 0
    while shift:
        bits = _bits_of_digit(num_prefixes, total) if digits else _MOST_BITS
        bits, shift = min(bits, shift), max(0, shift - bits)
        counts = torch.zeros(num_prefixes << bits, dtype=torch.int64)
        collectives.lockstep(_counting(keys, digits, _Digit(shift, bits), counts))
        counts = collectives.all_reduce(counts).view(num_prefixes, 1 << bits)
        if not digits:
            sizes = counts.sum(1)
            total = int(sizes.sum())
            of_groups = places(sizes)
            wanted = of_groups.flatten()
            prefixes = torch.arange(num_groups).repeat_interleave(of_groups.shape[1])
            found = torch.zeros_like(wanted)
        ends = counts.cumsum(1)
        values = (
            torch.searchsorted(ends[prefixes], wanted.unsqueeze(1), right=True).squeeze(1).clamp(max=(1 << bits) - 1)
        )
        wanted = wanted - (ends - counts)[prefixes, values]
        found |= values << shift
        chosen, prefixes = torch.unique((prefixes << bits) + values, return_inverse=True)
        next_prefix = torch.full((num_prefixes << bits,), -1)
        next_prefix[chosen] = torch.arange(len(chosen))
        digits.append(_Digit(shift, bits, next_prefix))
        num_prefixes = len(chosen)
    return found.view(num_groups, -1)


class _Digit(NamedTuple):
    """`bits` bits of a key from bit `shift` on; `next_prefix` maps prefix and digit to the longer prefix, or to -1."""

    shift: int
    bits: int
    next_prefix: Tensor = torch.empty(0, dtype=torch.int64)

    def places(self, keys: Tensor, prefixes: Tensor | int) -> Tensor:
        """Where the counts of (prefix, digit) stand."""
        # The mask takes away the copies of the sign that a right shift brings in.
        return (keys >> self.shift).bitwise_and_((1 << self.bits) - 1).add_(prefixes << self.bits)


def _bits_of_digit(num_prefixes: int, num_keys: int) -> int:
    counts = min(_MOST_COUNTS, max(_FEWEST_COUNTS, num_keys))
    return min(_MOST_BITS, max(_FEWEST_BITS, (counts // num_prefixes).bit_length() - 1))


def _counting(keys: Keys, known: Sequence[_Digit], digit: _Digit, counts: Tensor) -> Iterator[int]:
    for part in keys():
        num_keys = 0
        for of_part, prefixes in part:
            num_keys += len(of_part)
            remaining = of_part
            for former in known:
                prefixes = former.next_prefix.index_select(0, former.places(remaining, prefixes))
                kept = (prefixes >= 0).nonzero().squeeze(1)
                remaining, prefixes = remaining.index_select(0, kept), prefixes.index_select(0, kept)
            index = digit.places(remaining, prefixes)
            counts.scatter_add_(0, index, torch.ones_like(index))
        yield num_keys


def _ordered_keys(values: Tensor) -> Tensor:
    """Keys in the order of the values when read as unsigned: positive numbers get the sign bit, negative ones flip."""
    bits = values.view(torch.int64)
    return (bits >> 63).bitwise_or_(_SIGN_BIT).bitwise_xor_(bits)


def _values_of(keys: Tensor) -> Tensor:
    return (keys ^ (~(keys >> 63) | _SIGN_BIT)).view(torch.float64)
