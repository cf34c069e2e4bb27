"""Fit the encoder on the training rows, each rank on its share of them, to the same numbers for every world size."""

from __future__ import annotations

from collections import Counter

import polars as pl
import torch
from torch import Tensor

from dist_train.data.encoder import MISSING, UNKNOWN, Encoder, EncoderDescription
from dist_train.data.quantiles import exact_quantiles
from dist_train.data.table import ColumnKinds, labels, numbers
from dist_train.runtime.collectives import Collectives
from dist_train.runtime.console import log

# The smallest float32. Numbers are refused beyond float32, so with this the encoder's squares stay within float64.
SMALLEST_SPREAD = 2.0**-149


def fit_encoder(
    frame: pl.DataFrame,
    kinds: ColumnKinds,
    class_names: list[str],
    collectives: Collectives,
    *,
    max_categories: int,
    one_hot: bool,
    source: str,
) -> Encoder:
    """Encoder of the training rows; `frame` holds this rank's share of them, which may be empty.

    Raises Stopped when the ranks have agreed to stop.
    """
    columns = collectives.together(lambda: [numbers(frame[name], source) for name in kinds.numeric])
    counts = _count_categories(frame, kinds, collectives, source)
    vocabularies = {name: _most_frequent(counts[name], max_categories) for name in kinds.categorical}
    encoder = Encoder(
        EncoderDescription(
            numeric=list(kinds.numeric), categories=vocabularies, class_names=class_names, one_hot=one_hot
        )
    )
    for index, column in enumerate(columns):
        collectives.may_stop()
        _fit_numeric(encoder, index, column, collectives)
    seen = [_seen_slots(counts[name], vocabularies[name]) for name in kinds.categorical]
    encoder.seen.copy_(torch.cat(seen) if seen else encoder.seen)
    return encoder


def _fit_numeric(encoder: Encoder, index: int, column: Tensor, collectives: Collectives) -> None:
    missing = column.isnan()
    present = column[~missing]
    low, lower, median, upper, high = exact_quantiles(present, (0.0, 0.25, 0.5, 0.75, 1.0), collectives.sum).tolist()
    empty = low != low  # NaN: not one value in the training rows
    if empty:
        low = lower = median = upper = high = 0.0
    # Without an interquartile range (most rows hold one value) the whole range is the scale; a constant scales to 0.
    spread = upper - lower if upper - lower >= SMALLEST_SPREAD else (high - low) / 2
    constant = spread < SMALLEST_SPREAD
    if constant and collectives.is_first:
        what = "has no values" if empty else "holds one number"
        log.warning("column %r %s in the training rows: it is ignored", encoder.description.numeric[index], what)
    encoder.median[index] = median
    encoder.scale[index] = 0.0 if constant else 1 / spread
    encoder.flagged[index] = bool(collectives.sum(missing.sum().reshape(1)).item())


def _count_categories(
    frame: pl.DataFrame, kinds: ColumnKinds, collectives: Collectives, source: str
) -> dict[str, Counter[str | None]]:
    def local() -> dict[str, dict[str | None, int]]:
        return {name: dict(labels(frame[name], source).value_counts().iter_rows()) for name in kinds.categorical}

    merged: dict[str, Counter[str | None]] = {name: Counter() for name in kinds.categorical}
    for counts in collectives.agree(local):
        for name, of_rank in counts.items():
            merged[name].update(of_rank)
    return merged


def _most_frequent(counts: Counter[str | None], limit: int) -> list[str]:
    words = [(-count, word) for word, count in counts.items() if word is not None]
    return [word for _, word in sorted(words)[:limit]]


def _seen_slots(counts: Counter[str | None], vocabulary: list[str]) -> Tensor:
    slots = torch.ones(2 + len(vocabulary), dtype=torch.bool)
    slots[MISSING] = counts[None] > 0
    slots[UNKNOWN] = len(counts) - (None in counts) > len(vocabulary)
    return slots
