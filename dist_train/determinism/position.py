"""Where training stands, and how rows are cut among ranks: pure functions of (rank, world)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Position:
    """`epoch` counted from 0, and `rows` of that epoch already trained over all ranks together."""

    epoch: int = 0
    rows: int = 0


def split_evenly(start: int, stop: int, pieces: int, which: range | None = None) -> list[tuple[int, int]]:
    """Cut [start, stop) into contiguous pieces whose lengths differ by one at most; some may be empty.

    `which` of them are wanted; None: all.
    """
    length = stop - start
    return [(start + length * i // pieces, start + length * (i + 1) // pieces) for i in which or range(pieces)]
