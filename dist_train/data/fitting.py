"""Fit the encoder on the training rows, each rank on its share of them, to the same numbers for every world size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import polars as pl
import torch
from torch import Tensor

from dist_train.data.encoder import MISSING, UNKNOWN, Encoder, EncoderDescription
from dist_train.data.quantiles import exact_quantiles
from dist_train.data.table import ColumnKinds, as_text, numbers
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.system.console import log

# The smallest float32. Numbers are refused beyond float32, so with this the encoder's squares stay within float64.
SMALLEST_SPREAD = 2.0**-149

# Columns whose quantiles are found at once: each takes up to ten counts of 64 KiB.
_COLUMNS_AT_ONCE = 64
_ROWS_AT_ONCE = 1 << 16

Pieces = Callable[[Sequence[str]], Iterable[pl.DataFrame]]
"""The training rows of this rank in parts, those columns of them that are asked for, as often as they are asked for."""


def pieces_of(frame: pl.DataFrame) -> Pieces:
    """A table in memory, in parts."""
    return lambda names: frame.select(names).iter_slices(_ROWS_AT_ONCE)


def fit_encoder(
    pieces: Pieces,
    kinds: ColumnKinds,
    class_names: list[str],
    collectives: Collectives,
    *,
    max_categories: int,
    one_hot: bool,
    source: str,
    max_distinct: int | None = None,
) -> Encoder:
    """Encoder of the training rows; `pieces` are this rank's share of them, which may be empty.

    UserError when a column has more than `max_distinct` categories: they are counted in memory. Raises Stopped when
    the ranks have agreed to stop.
    """
    counts = _count_categories(pieces, kinds.categorical, collectives, source, max_distinct)
    vocabularies = {name: _most_frequent(counts[name], max_categories) for name in kinds.categorical}
    encoder = Encoder(
        EncoderDescription(
            numeric=list(kinds.numeric), categories=vocabularies, class_names=class_names, one_hot=one_hot
        )
    )
    for start in range(0, len(kinds.numeric), _COLUMNS_AT_ONCE):
        _fit_numeric(encoder, start, pieces, collectives, source)
    seen = [_seen_slots(counts[name], vocabularies[name]) for name in kinds.categorical]
    encoder.seen.copy_(torch.cat(seen) if seen else encoder.seen)
    return encoder


def _fit_numeric(encoder: Encoder, start: int, pieces: Pieces, collectives: Collectives, source: str) -> None:
    names = encoder.description.numeric[start : start + _COLUMNS_AT_ONCE]
    num_rows = 0

    def columns() -> Iterator[list[Tensor]]:
        nonlocal num_rows
        num_rows = 0
        for frame in pieces(names):
            num_rows += frame.height
            yield [_values(frame[name], source) for name in names]

    quantiles, present = exact_quantiles(columns, len(names), (0.0, 0.25, 0.5, 0.75, 1.0), collectives)
    missing = collectives.all_reduce(torch.tensor(num_rows)) - present
    for index, (name, found) in enumerate(zip(names, quantiles.tolist(), strict=True), start):
        low, lower, median, upper, high = found
        empty = low != low  # NaN: not one value in the training rows
        if empty:
            low = lower = median = upper = high = 0.0
        # Without an interquartile range (most rows hold one value) the whole range is the scale; a constant scales
        # to 0.
        spread = upper - lower if upper - lower >= SMALLEST_SPREAD else (high - low) / 2
        constant = spread < SMALLEST_SPREAD
        if constant and collectives.is_main:
            what = "has no values" if empty else "holds one number"
            log.warning("column %r %s in the training rows: it is ignored", name, what)
        encoder.median[index] = median
        encoder.scale[index] = 0.0 if constant else 1 / spread
    encoder.flagged[start : start + len(names)] = missing > 0


def _values(column: pl.Series, source: str) -> Tensor:
    if column.dtype == pl.Float64 and not column.null_count():  # parsed and checked before
        return torch.from_numpy(column.to_numpy(writable=True))
    return numbers(column, source)


def _count_categories(
    pieces: Pieces, names: Sequence[str], collectives: Collectives, source: str, limit: int | None
) -> dict[str, Counter[str | None]]:
    counts: dict[str, Counter[str | None]] = {name: Counter() for name in names}

    def count() -> Iterator[int]:
        for frame in pieces(names):
            for name in names:
                counts[name].update(dict(as_text(frame[name], source).value_counts().iter_rows()))
                _check_distinct(counts, name, source, limit)
            yield frame.height

    if not names:
        return counts
    collectives.lockstep(count())
    merged: dict[str, Counter[str | None]] = {name: Counter() for name in names}
    for of_rank in collectives.all_gather_object(lambda: {name: dict(counter) for name, counter in counts.items()}):
        for name, counter in of_rank.items():
            merged[name].update(counter)
    for name in names:
        _check_distinct(merged, name, source, limit)
    return merged


def _check_distinct(counts: Mapping[str, Counter[str | None]], name: str, source: str, limit: int | None) -> None:
    if limit is not None and len(counts[name]) > limit:
        raise UserError(
            f"{source}: column {name!r} has more than {limit:,} distinct texts: it looks like an identifier: "
            "name it in data.drop"
        )


def _most_frequent(counts: Counter[str | None], limit: int) -> list[str]:
    words = [(-count, word) for word, count in counts.items() if word is not None]
    return [word for _, word in sorted(words)[:limit]]


def _seen_slots(counts: Counter[str | None], vocabulary: list[str]) -> Tensor:
    slots = torch.ones(2 + len(vocabulary), dtype=torch.bool)
    slots[MISSING] = counts[None] > 0
    slots[UNKNOWN] = len(counts) - (None in counts) > len(vocabulary)
    return slots
