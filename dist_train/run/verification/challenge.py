"""Which windows of a run, or of the members of an ensemble, a challenge replays, and how probably it finds one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Generic, TypeVar

Window = tuple[int, int]
"""(start, end): the steps after `start` up to `end`."""
MemberWindow = tuple[str, int, int]
"""(member, start, end): a window of the run of a member."""
AnyWindow = TypeVar("AnyWindow", Window, MemberWindow)


@dataclass
class Challenge(Generic[AnyWindow]):
    """`drawn` of `windows` windows, chosen by `seed`; `differing` are those of them that a replay has not confirmed.

    `probability` is that of drawing an altered window, where one of all is altered.
    """

    seed: int
    windows: int
    drawn: list[AnyWindow]
    probability: float
    differing: list[AnyWindow] = field(default_factory=list)

    @staticmethod
    def of(windows: Sequence[AnyWindow], count: int, seed: int) -> Challenge[AnyWindow]:
        """Draw `count` windows; all where there are no more."""
        drawn = draw(windows, count, seed)
        return Challenge(seed, len(windows), drawn, detection_probability(len(windows), 1, len(drawn)))

    @property
    def steps(self) -> int:
        """Steps in the drawn windows."""
        return sum(end - start for *_, start, end in self.drawn)


def windows_between(starts: Sequence[int], last: int) -> list[Window]:
    """Windows that together have every step after the first of `starts` up to `last` once; each begins at a start."""
    begins = sorted({start for start in starts if start < last})
    return list(zip(begins, [*begins[1:], last], strict=True))


def draw(windows: Sequence[AnyWindow], count: int, seed: int) -> list[AnyWindow]:
    """`count` windows in their order, without replacement, each with the same probability; a function of the seed.

    They are those with the smallest SHA-256 of seed and window.
    """

    def key(window: AnyWindow) -> str:
        return hashlib.sha256(" ".join(map(str, (seed, *window))).encode()).hexdigest()

    return sorted(sorted(windows, key=key)[:count])


def detection_probability(windows: int, altered: int, drawn: int) -> float:
    """Probability that at least one of `altered` windows is among `drawn` of `windows`, drawn without replacement.

    1 - C(windows - altered, drawn) / C(windows, drawn): the hypergeometric distribution.
    """
    return 1 - comb(windows - altered, drawn) / comb(windows, drawn)
