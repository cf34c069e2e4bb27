"""Bounds that values of a configuration keep to: each yields the key and what is wrong with its value."""

from __future__ import annotations

from collections.abc import Iterator

MOST = 2**20


def at_least(key: str, value: int | None, least: int, reason: str = "") -> Iterator[tuple[str, str]]:
    """A value below `least`; None is not bounded."""
    if value is not None and value < least:
        yield key, f"must be at least {least}, is {value}" + (f" ({reason})" if reason else "")


def size(key: str, value: int | None, least: int = 1) -> Iterator[tuple[str, str]]:
    """A number of units, members or blocks that is below `least`, or that makes a tensor larger than any memory."""
    yield from at_least(key, value, least)
    if value is not None and value > MOST:
        yield key, f"must be at most {MOST}, is {value}"


def probability(key: str, value: float) -> Iterator[tuple[str, str]]:
    """A dropout probability that is not in [0, 1)."""
    if not 0 <= value < 1:
        yield key, f"a probability is at least 0 and below 1, is {value}"
