"""Raw columns -> the three tensors that a model gets, as a FeatureSpec says; and the fit of that spec.

The fit sees the training rows alone, each rank its share of them, and gives the same numbers for every world size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from dist_train.data.cells.missing import without_missing_words
from dist_train.data.cells.spelling import alike, merged
from dist_train.data.encoding.drift import counts_of_numbers, edges_of, stacked_edges
from dist_train.data.encoding.scaling import scaled
from dist_train.data.encoding.spec import (
    FIRST_CATEGORY,
    MISSING,
    NUM_QUANTILES,
    NUM_TRANSFORM_QUANTILES,
    UNKNOWN,
    CategoricalColumn,
    FeatureSpec,
    NumericColumn,
)
from dist_train.data.quantiles import columns_to_sort, exact_quantiles
from dist_train.data.tables.table import TRAINED_ON, ColumnKinds, numbers, require_columns, words_of
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.system.console import log

# The smallest float32. Numbers are refused beyond float32, so with this the encoder's squares stay within float64.
SMALLEST_SPREAD = 2.0**-149

# Quantiles that are found at once: the more, the fewer passes, and the shorter the digits of each.
_QUANTILES_AT_ONCE = 64 * NUM_QUANTILES

IntArray = np.ndarray[Any, np.dtype[np.int32]]
Pieces = Callable[[Sequence[str]], Iterable[pl.DataFrame]]
"""Gives the named columns of this rank's training rows in parts, anew at each call."""


class Inputs(NamedTuple):
    """What a model gets of some rows: numeric (rows, n) floating point, flags (rows, f) uint8, codes (rows, c) integer.

    A part that a table does not have is (rows, 0).
    """

    numeric: Tensor
    flags: Tensor
    codes: Tensor


class Encoder:
    """Scaling of numbers, vocabularies for categories. It holds nothing beside its spec.

    Numbers: missing cells get the training median, and a flag of their own in columns that had missing cells in
    training. `scaling.scaled` says how the others are scaled.

    Categories: codes of the vocabulary; how a model represents a code is its own business.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self._code_dtype = smallest_int(max(spec.category_sizes, default=1))

    @property
    def names(self) -> list[str]:
        """Names of the features, which amounts and dates have been made into."""
        return [*(c.name for c in self.spec.numeric), *(c.name for c in self.spec.categorical)]

    def to_arrays(self, frame: pl.DataFrame, source: str, first_row: int = 0) -> Inputs:
        """Columns by name -> float32 numbers, uint8 flags, codes in the smallest integer type.

        Other columns are ignored, in whichever order they come. The table begins with row `first_row` of the source.

        Raises:
            UserError: a column is missing, or a cell cannot be read; column and row are named.
        """
        spec = self.spec
        require_columns(frame, self.names, source, TRAINED_ON)
        numeric, flags, codes = inputs = self.empty(frame.height)
        flag = 0
        for index, column in enumerate(spec.numeric):
            values = numbers(frame[column.name], source, first_row)
            missing = values.isnan()
            numeric[:, index] = scaled(values, column).masked_fill_(missing, 0.0)
            if column.has_missing_flag:
                flags[:, flag] = missing
                flag += 1
        for index, words in enumerate(spec.categorical):
            codes[:, index] = torch.from_numpy(category_codes(frame[words.name], words, source))
        return inputs

    def empty(self, num_rows: int) -> Inputs:
        """Memory for so many encoded rows."""
        return Inputs(
            torch.empty((num_rows, self.spec.num_numeric), dtype=torch.float32),
            torch.empty((num_rows, self.spec.num_flags), dtype=torch.uint8),
            torch.empty((num_rows, self.spec.num_categorical), dtype=self._code_dtype),
        )


def with_missing_cells(table: pl.DataFrame, spec: FeatureSpec, words: Sequence[str]) -> pl.DataFrame:
    """A table whose cells are null where they are a word for "missing" and no category of the spec."""
    categories = {column.name: column.categories for column in spec.categorical}
    wanted = frozenset(spec.names)
    cells = (column for column in table.get_columns() if column.name in wanted)
    return table.with_columns(without_missing_words(column, words, categories.get(column.name, ())) for column in cells)


def smallest_int(count: int) -> torch.dtype:
    """The smallest integer type that holds the numbers below `count`."""
    if count <= 1 << 8:
        return torch.uint8
    return torch.int16 if count <= 1 << 15 else torch.int32


def category_codes(column: pl.Series, vocabulary: CategoricalColumn, source: str) -> IntArray:
    """Cells of a column -> codes of the vocabulary, (rows,)."""
    words = words_of(column, source)
    codes: dict[str | None, int] = {word: FIRST_CATEGORY + index for index, word in enumerate(vocabulary.categories)}
    # A text that is a category as it stands is that one; so a vocabulary of an earlier release keeps its meaning.
    others = [word for word in dict.fromkeys(words) if word is not None and word not in codes]
    typed = column.dtype.is_numeric() or column.dtype == pl.Boolean
    found = alike(others, vocabulary.categories, typed=typed) if codes and others else {}
    codes |= {word: FIRST_CATEGORY + index for word, index in found.items()}
    if vocabulary.hash_buckets:
        codes |= {word: vocabulary.code_of_others(word) for word in others if word not in found}
    codes[None] = MISSING
    return np.array([codes.get(word, UNKNOWN) for word in words], np.int32)


def fit_spec(
    pieces: Pieces,
    kinds: ColumnKinds,
    class_names: Sequence[str],
    collectives: Collectives,
    *,
    max_categories: int,
    source: str,
    max_distinct: int | None = None,
    numeric_transform: str = "robust",
    hash_buckets: int = 0,
    num_rows: int | None = None,
) -> FeatureSpec:
    """The spec of the training rows; `pieces` are this rank's share of them, which may be empty.

    `num_rows`: rows over all ranks, where they are known.
    `numeric_transform` is robust or quantile: see `scaling.scaled`. Columns of more than `max_categories` categories
    have `hash_buckets` codes for the others.

    Raises:
        UserError: a column has more than `max_distinct` categories, which are counted in memory.
        Stopped: the ranks have agreed to stop.
    """
    counts = _count_categories(pieces, kinds.categorical, collectives, source, max_distinct)
    numeric: list[NumericColumn] = []
    num_quantiles = NUM_QUANTILES if numeric_transform == "robust" else NUM_TRANSFORM_QUANTILES
    at_once = max(1, _QUANTILES_AT_ONCE // num_quantiles, columns_to_sort(num_rows) if num_rows else 0)
    for start in range(0, len(kinds.numeric), at_once):
        names = kinds.numeric[start : start + at_once]
        found = _fit_numeric(names, pieces, collectives, source, num_quantiles, num_rows)
        numeric += [replace(column, transform=numeric_transform) for column in found]
    categorical = [_fit_categorical(name, counts[name], max_categories, hash_buckets) for name in kinds.categorical]
    return FeatureSpec(numeric=tuple(numeric), categorical=tuple(categorical), class_names=tuple(class_names))


def _fit_numeric(
    names: Sequence[str],
    pieces: Pieces,
    collectives: Collectives,
    source: str,
    num_quantiles: int,
    num_rows: int | None,
) -> list[NumericColumn]:
    own_rows = 0

    def columns() -> Iterator[list[Tensor]]:
        nonlocal own_rows
        own_rows = 0
        for frame in pieces(names):
            own_rows += frame.height
            yield [_values(frame[name], source) for name in names]

    fractions = [index / (num_quantiles - 1) for index in range(num_quantiles)]
    quantiles, present = exact_quantiles(columns, len(names), fractions, collectives, num_rows)
    missing = collectives.all_reduce(torch.tensor(own_rows)) - present
    fitted = [
        _numeric_column(name, found, num_missing > 0, collectives)
        for name, found, num_missing in zip(names, quantiles.tolist(), missing.tolist(), strict=True)
    ]
    bins = _count_bins(columns, [edges_of(column.quantiles) for column in fitted], collectives)
    return [replace(column, bins=tuple(of_column)) for column, of_column in zip(fitted, bins.tolist(), strict=True)]


def _count_bins(
    columns: Callable[[], Iterable[Sequence[Tensor]]], edges: Sequence[Sequence[float]], collectives: Collectives
) -> Tensor:
    """The rows of all ranks between the edges of each column, and the missing ones, (columns, bins + 1)."""
    stacked = stacked_edges(edges)
    counts = torch.zeros((len(edges), stacked.shape[1] + 2), dtype=torch.int64)

    def count() -> Iterator[int]:
        for piece in columns():
            counts.add_(counts_of_numbers(piece, stacked))
            yield len(piece[0])

    if edges:
        collectives.lockstep(count())
    return collectives.all_reduce(counts)


def _numeric_column(name: str, quantiles: list[float], has_missing: bool, collectives: Collectives) -> NumericColumn:
    low, lower, median, upper, high = quantiles[:: len(quantiles) // 4]
    empty = low != low  # NaN: not one value in the training rows
    if empty:
        low = lower = median = upper = high = 0.0
    # Without an interquartile range (most rows hold one value) the whole range is the scale; a constant scales to 0.
    spread = upper - lower if upper - lower >= SMALLEST_SPREAD else (high - low) / 2
    constant = spread < SMALLEST_SPREAD
    if constant and collectives.is_main:
        what = "has no values" if empty else "holds one number"
        log.warning("column %r %s in the training rows: it is ignored", name, what)
    return NumericColumn(
        name=name,
        median=median,
        scale=0.0 if constant else 1 / spread,
        has_missing_flag=has_missing,
        quantiles=() if empty else tuple(quantiles),
    )


def _values(column: pl.Series, source: str) -> Tensor:
    if column.dtype == pl.Float64 and not column.null_count():  # parsed and checked before
        return torch.from_numpy(column.to_numpy(writable=True))
    return numbers(column, source)


def _fit_categorical(name: str, counts: Counter[str | None], limit: int, hash_buckets: int) -> CategoricalColumn:
    counts = merged(counts)
    words = sorted((-count, word) for word, count in counts.items() if word is not None)
    categories = [word for _, word in words[:limit]]
    column = CategoricalColumn(
        name=name,
        categories=tuple(categories),
        seen_in_training=(),
        hash_buckets=hash_buckets if len(words) > limit else 0,
    )
    of_codes = [0] * column.size
    of_codes[MISSING] = counts[None]
    of_codes[FIRST_CATEGORY : FIRST_CATEGORY + len(categories)] = [-count for count, _ in words[:limit]]
    for count, word in words[limit:]:
        of_codes[column.code_of_others(word)] -= count
    return replace(column, seen_in_training=tuple(count > 0 for count in of_codes), counts=tuple(of_codes))


def _count_categories(
    pieces: Pieces, names: Sequence[str], collectives: Collectives, source: str, limit: int | None
) -> dict[str, Counter[str | None]]:
    counts: dict[str, Counter[str | None]] = {name: Counter() for name in names}

    def count() -> Iterator[int]:
        for frame in pieces(names):
            for name in names:
                counts[name].update(words_of(frame[name], source))
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
