"""How far the columns of some rows have moved from the training rows: the population stability index of each.

PSI = sum over bins of (q - p) ln(q / p), with the shares p of the training rows, and q of others. The training rows are
counted when the spec is fitted: a tenth of the numbers of a column fall between two edges, each category has a code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_train.data.encoding.scaling import scaled

if TYPE_CHECKING:
    from dist_train.data.encoding.spec import CategoricalColumn, FeatureSpec, NumericColumn

NUM_BINS = 10
MOST_CATEGORIES = 20
"""Categories of a column, the most frequent first, that have a bin of their own; the others share one."""
MOVED = 0.25
"""From here on a model needs attention, by a rule of the field (Siddiqi 2006)."""
# A PSI of rows that have not moved is beyond this quantile once in a thousand times.
_SURE = 3.09

Counts = Mapping[str, Sequence[int]]
"""Rows of each bin, by name of the numeric feature or categorical column."""


def population_stability_index(expected: npt.NDArray[np.float64], actual: npt.NDArray[np.float64]) -> float:
    """PSI of two weights of each bin. An empty bin counts as half a row, so that the logarithm is finite."""
    p, q = (np.maximum(weights, 0.5) / np.maximum(weights, 0.5).sum() for weights in (expected, actual))
    return float(((q - p) * np.log(q / p)).sum())


def drift(expected: Counts, actual: Counts) -> dict[str, float]:
    """PSI of each column, without the bins that neither has a row in. None of columns without rows."""
    found = {}
    for name, counts in actual.items():
        first, second = (np.asarray(numbers, np.float64) for numbers in (expected[name], counts))
        used = (first + second) > 0
        if first.any() and second.any():
            found[name] = population_stability_index(first[used], second[used])
    return found


def moved(expected: Counts, actual: Counts) -> dict[str, float]:
    """Those of `drift` that are large, and larger than chance makes them in so few rows.

    The PSI of rows that have not moved is about (1/n + 1/N) times a chi-squared number with as many degrees of freedom
    as there are bins less one (Yurdakul 2018), here by the approximation of Wilson and Hilferty (1931).
    """
    found = {}
    for name, index in drift(expected, actual).items():
        of_training, of_rows = sum(expected[name]), sum(actual[name])
        freedom = max(1, sum(a + b > 0 for a, b in zip(expected[name], actual[name], strict=True)) - 1)
        spread = 2 / (9 * freedom)
        by_chance = freedom * (1 - spread + _SURE * spread**0.5) ** 3 * (1 / of_training + 1 / of_rows)
        if index >= max(MOVED, by_chance):
            found[name] = index
    return found


def edges_of(quantiles: Sequence[float]) -> list[float]:
    """Ascending inner edges of at most `NUM_BINS` bins of numbers; a number on an edge is in the bin above."""
    if not quantiles:
        return []
    last = len(quantiles) - 1
    chosen = {quantiles[round(tenth * last / NUM_BINS)] for tenth in range(1, NUM_BINS)}
    return sorted(edge for edge in chosen if edge > quantiles[0])


def counts_of_numbers(columns: Sequence[Tensor], edges: Tensor) -> Tensor:
    """Rows of each bin, then those that are missing (NaN): columns (n,) and edges (columns, n) -> (columns, bins + 1).

    Edges that a column does not have are infinite.
    """
    values = torch.stack(list(columns))
    bins = edges.shape[1] + 1
    places = torch.searchsorted(edges, values, right=True).masked_fill_(values.isnan(), bins)
    places += torch.arange(len(values)).unsqueeze(1) * (bins + 1)
    return torch.bincount(places.flatten(), minlength=len(values) * (bins + 1)).view(len(values), bins + 1)


def stacked_edges(edges: Sequence[Sequence[float]]) -> Tensor:
    """Edges of columns, (columns, NUM_BINS - 1) float64, filled up with infinity."""
    found = torch.full((len(edges), NUM_BINS - 1), torch.inf, dtype=torch.float64)
    for row, of_column in zip(found, edges, strict=True):
        row[: len(of_column)] = torch.tensor(of_column, dtype=torch.float64)
    return found


class TrainingBins:
    """The bins of the columns of a spec, and the training rows in them. Columns that were not counted have none."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._numeric = [(place, column) for place, column in enumerate(spec.numeric) if column.bins]
        self._categorical = [(place, column) for place, column in enumerate(spec.categorical) if column.counts]
        self._flags = dict(zip(_names_with_flag(spec), range(spec.num_flags), strict=True))
        encoded = [_encoded_edges(column) for _, column in self._numeric]
        self._edges = stacked_edges(encoded)
        tables = [_bins_of_codes(column) for _, column in self._categorical]
        self._starts = torch.tensor([0, *accumulate(map(len, tables))][:-1], dtype=torch.int64)
        self._table = torch.tensor([place for table in tables for place in table], dtype=torch.int64)
        self.expected: dict[str, tuple[int, ...]] = {column.name: column.bins for _, column in self._numeric}
        for (_, column), table in zip(self._categorical, tables, strict=True):
            folded = np.bincount(table, weights=column.counts, minlength=_WIDTH)
            self.expected[column.name] = tuple(int(count) for count in folded)

    def counts(self, inputs: tuple[Tensor, ...], unflagged: Callable[[str], int]) -> dict[str, tuple[int, ...]]:
        """Encoded rows in the bins: numeric (rows, n), flags (rows, f), codes (rows, c), as a model gets them.

        `unflagged` gives the missing cells of a feature that has no flag for them; they are encoded as the median.
        """
        numeric, flags, codes = (part.cpu() for part in inputs)
        found: dict[str, tuple[int, ...]] = {}
        if self._numeric:
            # The edges are rounded as the numbers are: where numbers rise, neither falls.
            edges = self._edges.to(numeric.dtype).float()
            columns = []
            for place, column in self._numeric:
                values = numeric[:, place].float()
                missing = flags[:, self._flags[column.name]].bool() if column.has_missing_flag else None
                columns.append(values if missing is None else values.masked_fill(missing, torch.nan))
            numbers = counts_of_numbers(columns, edges).tolist()
            medians = torch.searchsorted(edges, torch.zeros(len(edges), 1), right=True).flatten().tolist()
            for (_, column), of_bins, median in zip(self._numeric, numbers, medians, strict=True):
                missing_cells = 0 if column.has_missing_flag else unflagged(column.name)
                of_bins[median] -= missing_cells
                of_bins[-1] += missing_cells
                found[column.name] = tuple(of_bins)
        if self._categorical:
            chosen = codes[:, [place for place, _ in self._categorical]].long() + self._starts
            places = self._table[chosen] + torch.arange(len(self._categorical)) * _WIDTH
            cells = torch.bincount(places.flatten(), minlength=len(self._categorical) * _WIDTH).view(-1, _WIDTH)
            for (_, words), of_bins in zip(self._categorical, cells.tolist(), strict=True):
                found[words.name] = tuple(of_bins)
        return found


# Bins of a categorical column: missing cells, all other cells, and one for each frequent category.
_MISSING, _OTHERS = 0, 1
_WIDTH = 2 + MOST_CATEGORIES


def _bins_of_codes(column: CategoricalColumn) -> list[int]:
    """The bin of each code; categories stand in the order of their counts."""
    own = min(MOST_CATEGORIES, len(column.categories))
    return [_MISSING, _OTHERS, *range(2, 2 + own), *[_OTHERS] * (column.size - 2 - own)]


def _encoded_edges(column: NumericColumn) -> list[float]:
    return scaled(torch.tensor(edges_of(column.quantiles), dtype=torch.float64), column).tolist()


def _names_with_flag(spec: FeatureSpec) -> list[str]:
    return [column.name for column in spec.numeric if column.has_missing_flag]
