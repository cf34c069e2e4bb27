"""Cells that a model has not seen the like of in training: unknown categories, numbers outside of the range of the
training rows, and missing cells where none were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from torch import Tensor

from dist_train.data.scaling import scaled
from dist_train.data.spec import MISSING, UNKNOWN, FeatureSpec

_ROWS_AT_ONCE = 1 << 16
# Encoded numbers are float32 and within (-3, 3).
_ROUNDING = 1e-6
# A column is named from this share of its cells on; one with categories in another spelling always.
MANY = 0.1
_MOST_TEXTS = 3


@dataclass(frozen=True)
class Unfamiliar:
    """Counts of unfamiliar cells by name of the column; `+` is of the rows of both, which have the same columns.

    `unknown_cells` are categories that are not in the vocabulary, `missing_cells` the missing cells of every column
    that is counted; `never_missing` are the columns that had no missing cell in training. `outside_cells` are numbers
    below the smallest or above the largest one of training. `texts` has some of the unknown categories with their
    cells, and `spellings` the category that such a text is but for its case and blanks.
    """

    rows: int = 0
    unknown_cells: Mapping[str, int] = field(default_factory=dict)
    missing_cells: Mapping[str, int] = field(default_factory=dict)
    never_missing: frozenset[str] = frozenset()
    outside_cells: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    spellings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __add__(self, other: Unfamiliar) -> Unfamiliar:
        return Unfamiliar(
            self.rows + other.rows,
            _sums(self.unknown_cells, other.unknown_cells),
            _sums(self.missing_cells, other.missing_cells),
            self.never_missing | other.never_missing,
            _sums(self.outside_cells, other.outside_cells),
            {
                name: _most_frequent(_sums(self.texts.get(name, {}), other.texts.get(name, {})))
                for name in {**self.texts, **other.texts}
            },
            {
                name: {**self.spellings.get(name, {}), **other.spellings.get(name, {})}
                for name in {**self.spellings, **other.spellings}
            },
        )

    @property
    def unknown(self) -> dict[str, float]:
        """Shares of the unknown categories among the cells that are there, of columns with many of them."""
        return _many(
            {name: cells / max(1, self.rows - self.missing_cells[name]) for name, cells in self.unknown_cells.items()}
        )

    @property
    def missing(self) -> dict[str, float]:
        """Shares of the missing cells among all cells, of columns with many of them and none in training."""
        counts = {name: cells for name, cells in self.missing_cells.items() if name in self.never_missing}
        return _many({name: cells / max(1, self.rows) for name, cells in counts.items()})

    @property
    def outside(self) -> dict[str, float]:
        """Shares of the numbers that are outside of the range of training among all cells, of columns with many."""
        return _many({name: cells / max(1, self.rows) for name, cells in self.outside_cells.items()})

    def lines(self) -> list[str]:
        """One for each column that is named, or two."""
        unknown = {name: share for name, share in self.unknown.items() if name not in self.spellings}
        return [
            *(f"column {name!r}: the model knows {', '.join(f'{c!r}, and not {t!r}' for t, c in known.items())}: "
              "such cells are scored as an unknown category"
              for name, known in self.spellings.items()),
            *(f"column {name!r}: {share:.0%} of the cells are categories that the model does not know"
              + (f", as {', '.join(map(repr, self.texts[name]))}" if self.texts.get(name) else "")
              for name, share in unknown.items()),
            *(f"column {name!r}: {share:.0%} of the numbers are outside of the range of the training rows"
              for name, share in self.outside.items()),
            *(f"column {name!r}: {share:.0%} of the cells are missing, and none was in training"
              for name, share in self.missing.items()),
        ]  # fmt: skip

    def as_json(self) -> dict[str, dict[str, Any]]:
        """By key; those without a column are left out."""
        found: dict[str, dict[str, Any]] = {
            "unknown_categories": self.unknown,
            "spelled_otherwise": {name: dict(known) for name, known in self.spellings.items()},
            "outside_training_range": self.outside,
            "missing_unlike_training": self.missing,
        }
        return {key: of_columns for key, of_columns in found.items() if of_columns}


def unfamiliar_cells(
    slice_of: Callable[[int, int], tuple[Tensor, ...]], num_rows: int, spec: FeatureSpec, table: pl.DataFrame | None
) -> Unfamiliar:
    """What is unfamiliar in encoded rows; `slice_of` gives the model's inputs of the rows from one number to another.

    Missing numbers, and the texts of unknown categories, are looked for in `table`, the rows before they were encoded.
    """
    num_outside = torch.zeros(spec.num_numeric, dtype=torch.int64)
    low, high = _range_of_encoded(spec)
    strangers: dict[str, Counter[str]] = {}
    unknown, missing = (torch.zeros(spec.num_categorical, dtype=torch.int64) for _ in range(2))
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        numeric, _, codes = slice_of(start, min(num_rows, start + _ROWS_AT_ONCE))
        values = numeric.cpu().float()
        slack = max(_ROUNDING, 8 * torch.finfo(numeric.dtype).eps)
        num_outside += ((values < low - slack) | (values > high + slack)).sum(0)
        is_unknown = (codes == UNKNOWN).cpu()
        unknown += is_unknown.sum(0)
        missing += (codes == MISSING).sum(0).cpu()
        for place in is_unknown.any(0).nonzero().flatten().tolist() if table is not None else ():
            assert table is not None
            name = spec.categorical[place].name
            cells = table[name][start : start + _ROWS_AT_ONCE].filter(pl.Series(is_unknown[:, place].numpy()))
            strangers.setdefault(name, Counter()).update(cells.cast(pl.String, strict=False).drop_nulls().to_list())
    names = [column.name for column in spec.categorical]
    missing_cells = dict(zip(names, missing.tolist(), strict=True))
    never_missing = {column.name for column in spec.categorical if not column.seen_in_training[MISSING]}
    if table is not None:
        made = spec.columns_of_features
        for column in spec.numeric:
            if not column.has_missing_flag:
                name = made.get(column.name, column.name)
                missing_cells[name] = _num_missing(table[name])
                never_missing.add(name)
    unknown_cells = dict(zip(names, unknown.tolist(), strict=True))
    outside: dict[str, int] = {}
    for column, cells in zip(spec.numeric, num_outside.tolist(), strict=True):
        if column.name not in spec.columns_of_features:
            outside[column.name] = cells
    return Unfamiliar(
        num_rows,
        unknown_cells,
        missing_cells,
        frozenset(never_missing),
        outside,
        {name: _most_frequent(texts) for name, texts in strangers.items()},
        _spellings(spec, strangers),
    )


def _range_of_encoded(spec: FeatureSpec) -> tuple[Tensor, Tensor]:
    """What the smallest and the largest training number of each column are encoded as.

    Without bound where that does not tell numbers outside from them: a column of one number, one that is encoded by its
    quantiles, and one of a spec without quantiles.
    """
    low, high = (torch.full((spec.num_numeric,), bound) for bound in (-torch.inf, torch.inf))
    for place, column in enumerate(spec.numeric):
        if column.transform == "robust" and column.scale and column.quantiles:
            ends = scaled(torch.tensor([column.quantiles[0], column.quantiles[-1]], dtype=torch.float64), column)
            low[place], high[place] = ends.float()
    return low, high


def _spellings(spec: FeatureSpec, strangers: Mapping[str, Counter[str]]) -> dict[str, dict[str, str]]:
    """By column the unknown texts that are one category but for case and blanks, and that category."""
    found: dict[str, dict[str, str]] = {}
    for column in spec.categorical:
        texts = strangers.get(column.name)
        if not texts:
            continue
        plain = Counter(map(_plain, column.categories))
        known = {_plain(category): category for category in column.categories}
        alike = {text: known[_plain(text)] for text in sorted(texts) if plain[_plain(text)] == 1}
        if alike:
            found[column.name] = dict(list(alike.items())[:_MOST_TEXTS])
    return found


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _most_frequent(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_TEXTS])


def _sums(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _many(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: share for name, share in shares.items() if share >= MANY}


def _num_missing(column: pl.Series) -> int:
    return column.null_count() + (int(column.is_nan().sum()) if column.dtype.is_float() else 0)
