"""How much a distribution has moved: the population stability index of scores and of features.

PSI = sum over bins of (q - p) ln(q / p), with the shares p of the rows that the bins were made of, and q of others. By
a rule of the field (Siddiqi 2006) below 0.1 nothing has moved, and above 0.25 a model needs attention. Of features it
is called characteristic stability index, CSI.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dist_train.data.encoding.drift import MOST_CATEGORIES, population_stability_index
from dist_train.risk.binary import quantile_edges

Floats = npt.NDArray[np.float64]


def psi_of_numbers(expected: Floats, actual: Floats, num_bins: int = 10) -> float:
    """PSI over the deciles of `expected`; missing numbers (NaN) have a bin of their own."""
    known = expected[~np.isnan(expected)]
    edges = quantile_edges(known, np.ones(len(known)), num_bins) if len(known) else np.empty(0)

    def shares(values: Floats) -> Floats:
        place = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, np.nan_to_num(values), side="right"))
        return np.bincount(place, minlength=len(edges) + 2).astype(np.float64)

    first, second = shares(expected), shares(actual)
    used = (first + second) > 0
    return population_stability_index(first[used], second[used])


def psi_of_categories(expected: pl.Series, actual: pl.Series) -> float:
    """PSI over the most frequent categories of `expected`; others share a bin, and missing cells have one."""
    names = most_frequent(expected, MOST_CATEGORIES)

    def shares(values: pl.Series) -> Floats:
        text = values.cast(pl.String)
        own = [int((text == name).sum()) for name in names]
        missing = text.null_count()
        return np.array([*own, len(text) - sum(own) - missing, missing], dtype=np.float64)

    first, second = shares(expected), shares(actual)
    used = (first + second) > 0
    return population_stability_index(first[used], second[used])


def most_frequent(column: pl.Series, number: int) -> list[str]:
    """So many categories as text, the most frequent first, equally frequent ones in alphabetical order."""
    counts = column.drop_nulls().cast(pl.String).value_counts()
    pairs = zip(counts["count"].to_list(), counts[column.name].to_list(), strict=True)
    return [name for _, name in sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:number]]


def is_number(column: pl.Series) -> bool:
    """Whether a column is compared by quantiles."""
    return column.dtype.is_numeric()


def numbers_of(column: pl.Series) -> Floats:
    """A numeric column as float64, NaN where missing or not finite."""
    values = column.cast(pl.Float64).to_numpy().astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def feature_stability(tables: dict[str, pl.DataFrame]) -> list[dict[str, Any]]:
    """Of each column: the PSI of `valid` and `test` against `train`, and the share of missing cells in each."""
    found = []
    expected = tables["train"]
    for name in expected.columns:
        line: dict[str, Any] = {"feature": name, "psi": {}, "missing": {}}
        for split, table in tables.items():
            line["missing"][split] = table[name].null_count() / table.height if table.height else None
            if split != "train" and table.height:
                line["psi"][split] = _psi(expected[name], table[name])
        found.append(line)
    return sorted(found, key=lambda line: -max(line["psi"].values(), default=0.0))


def _psi(expected: pl.Series, actual: pl.Series) -> float:
    if is_number(expected):
        return psi_of_numbers(numbers_of(expected), numbers_of(actual))
    return psi_of_categories(expected, actual)
