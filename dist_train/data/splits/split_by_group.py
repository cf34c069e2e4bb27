"""Parts of a table of whole groups: all rows of a group, a customer for example, are in one part."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from dist_train.determinism.keyed_random import derive, mix
from dist_train.distributed.collectives import Collectives

Integers = npt.NDArray[np.int64]

# Rows of a table of counts after which it is added up.
_ROWS_AT_ONCE = 1 << 20


class GroupRows(NamedTuple):
    """Group, class index and time of some rows, (rows,) int64 each; the time is None where no time counts."""

    groups: Tensor
    classes: Tensor
    times: Tensor | None


@dataclass(frozen=True)
class GroupSplit:
    """The part of each group: `groups`, (groups,) int64, ascending; `of_groups`, (groups,) uint8."""

    groups: Tensor
    of_groups: Tensor

    @classmethod
    def fit(
        cls,
        pieces: Callable[[], Iterable[GroupRows]],
        collectives: Collectives,
        *,
        borders: Callable[[int], list[int]],
        seed: int,
    ) -> GroupSplit:
        """`pieces` gives this rank's rows in parts. `borders` are those of `Parts`.

        The result is a function of the groups, their rows and the seed: not of the order of the rows, and not of the
        world size. Every rank holds one number for each group and class.
        """
        tables: list[pl.DataFrame] = []

        def count() -> Iterator[int]:
            for rows in pieces():
                tables.append(_counted(rows))
                if sum(table.height for table in tables) > 2 * tables[0].height + _ROWS_AT_ONCE:
                    tables[:] = [_added(tables)]
                yield len(rows.groups)

        collectives.lockstep(count())
        own = _added(tables) if tables else None
        gathered = [table for table in collectives.all_gather_object(lambda: own) if table is not None]
        counts = _added(gathered).sort("group", "class")
        groups, first = np.unique(counts["group"].to_numpy(), return_index=True)
        if "time" in counts.columns:
            sizes = np.add.reduceat(counts["rows"].to_numpy(), first)
            of_groups = _by_time(np.maximum.reduceat(counts["time"].to_numpy(), first), sizes, borders)
        else:
            of_groups = _stratified(counts, groups, first, borders, seed)
        return cls(torch.from_numpy(groups), torch.from_numpy(of_groups))

    def parts(self, groups: Tensor) -> Tensor:
        """Part of each row by its group, int64."""
        return self.of_groups[torch.searchsorted(self.groups, groups)].long()

    def pack(self) -> dict[str, Any]:
        """As JSON types; `unpack` reads it."""
        return {
            "groups": b64encode(self.groups.numpy().tobytes()).decode(),
            "of_groups": b64encode(self.of_groups.numpy().tobytes()).decode(),
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> GroupSplit:
        """What `pack` packed."""
        groups = np.frombuffer(bytearray(b64decode(packed["groups"])), dtype=np.int64)
        of_groups = np.frombuffer(bytearray(b64decode(packed["of_groups"])), dtype=np.uint8)
        return cls(torch.from_numpy(groups), torch.from_numpy(of_groups))


def _counted(rows: GroupRows) -> pl.DataFrame:
    """Rows of each group and class, and the last time of them."""
    columns = {"group": rows.groups.numpy(), "class": rows.classes.long().numpy()}
    if rows.times is not None:
        columns["time"] = rows.times.numpy()
    return _added([pl.DataFrame(columns).with_columns(rows=pl.lit(1, dtype=pl.Int64))])


def _added(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    table = pl.concat(tables)
    last = [pl.col("time").max()] if "time" in table.columns else []
    return table.group_by("group", "class").agg(pl.col("rows").sum(), *last)


def _by_time(last: Integers, sizes: Integers, borders: Callable[[int], list[int]]) -> npt.NDArray[np.uint8]:
    """Part of each group by its last time, the latest first; each border is nearest to the rows that are wished for."""
    times, place = np.unique(last, return_inverse=True)
    rows = np.zeros(len(times), dtype=np.int64)
    np.add.at(rows, place, sizes)
    # Rows of the groups that end at the i-th time or later; and 0, of those that end after all times.
    counts = np.append(rows[::-1].cumsum()[::-1], 0)
    starts = [int(np.abs(counts[::-1] - wish).argmin()) for wish in borders(int(sizes.sum()))]
    first_times = len(times) - np.array(starts)
    parts: npt.NDArray[np.uint8] = (place[:, None] < first_times).sum(1).astype(np.uint8)
    return parts


def _stratified(
    counts: pl.DataFrame, groups: Integers, first: npt.NDArray[np.intp], borders: Callable[[int], list[int]], seed: int
) -> npt.NDArray[np.uint8]:
    """Part of each group. The stratum of a group is the rarest of its classes.

    In each stratum the parts are filled in turn. A part takes the groups in the order of a hash of seed and group, and
    leaves out those that would bring its rows further from the wish. What a stratum misses, the next one makes up for.
    """
    classes, rows = counts["class"].to_numpy(), counts["rows"].to_numpy()
    of_classes = np.bincount(classes, weights=rows).astype(np.int64)
    rank = np.argsort(np.argsort(of_classes, kind="stable"), kind="stable")
    strata = np.minimum.reduceat(rank[classes], first)
    sizes = np.add.reduceat(rows, first)
    keys = mix(torch.from_numpy(groups.copy()) + derive("groups", seed)).numpy().view(np.uint64)
    num_parts = len(borders(0)) + 1
    parts = np.full(len(groups), num_parts - 1, dtype=np.uint8)
    missing = np.zeros(num_parts - 1, dtype=np.int64)
    for stratum in np.unique(strata):
        of_stratum = np.flatnonzero(strata == stratum)
        remaining = of_stratum[np.argsort(keys[of_stratum], kind="stable")]
        wishes = np.diff(borders(int(sizes[of_stratum].sum())), prepend=0) + missing
        for part, wish in enumerate(wishes):
            taken = _nearest(sizes[remaining], int(wish))
            parts[remaining[taken]] = part
            missing[part] = wish - sizes[remaining[taken]].sum()
            remaining = remaining[~taken]
    return parts


def _nearest(sizes: Integers, wish: int) -> npt.NDArray[np.bool_]:
    """Which of some groups are taken in their order so that their rows together come near to the wish."""
    ends = sizes.cumsum()
    whole = int(np.searchsorted(ends, wish, side="right"))
    taken = np.arange(len(sizes)) < whole
    gap = wish - (int(ends[whole - 1]) if whole else 0)
    place = whole
    while gap > 0:
        fitting = np.flatnonzero(sizes[place:] < 2 * gap)
        if not len(fitting):
            break
        place += int(fitting[0])
        taken[place] = True
        gap -= int(sizes[place])
        place += 1
    return taken
