"""Cells that a model has not seen the like of in training (unknown categories, numbers outside of the range of the
training rows, missing cells where none were), and columns that have moved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import polars as pl
import torch
from torch import Tensor

from dist_train.data.cells.readings import with_features
from dist_train.data.encoding.contract import ColumnContract, outside
from dist_train.data.encoding.drift import TrainingBins, drift, moved
from dist_train.data.encoding.scaling import LARGEST_NORMAL, scaled
from dist_train.data.encoding.spec import MISSING, UNKNOWN, FeatureSpec
from dist_train.data.tables.table import numbers

_ROWS_AT_ONCE = 1 << 16
# Encoded numbers are float32 and within (-3, 3).
_ROUNDING = 1e-6
# A column is named from this share of its cells on; one with categories in another spelling always.
MANY = 0.1
_MOST_TEXTS = 3
_MOST_MOVED = 5


@dataclass(frozen=True)
class Unfamiliar:
    """Counts of unfamiliar cells by name of the column; `+` is of the rows of both, which have the same columns.

    `unknown_cells` are categories that are not in the vocabulary, `missing_cells` the missing cells of every column
    that is counted; `never_missing` are the columns that had no missing cell in training. `outside_cells` are numbers
    below the smallest or above the largest one of training. `texts` has some of the unknown categories with their
    cells, and `spellings` the category that such a text is but for its case and blanks. `bins` counts the rows by
    column as `data/encoding/drift.py` does, and `training_bins` those of training.
    """

    rows: int = 0
    unknown_cells: Mapping[str, int] = field(default_factory=dict)
    missing_cells: Mapping[str, int] = field(default_factory=dict)
    never_missing: frozenset[str] = frozenset()
    outside_cells: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    spellings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    bins: Mapping[str, Sequence[int]] = field(default_factory=dict)
    training_bins: Mapping[str, Sequence[int]] = field(default_factory=dict)

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
            {
                name: [a + b for a, b in zip_longest(self.bins.get(name, ()), other.bins.get(name, ()), fillvalue=0)]
                for name in {**self.bins, **other.bins}
            },
            {**self.training_bins, **other.training_bins},
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

    @property
    def drift(self) -> dict[str, float]:
        """Population stability index of each column against the training rows."""
        return drift(self.training_bins, self.bins)

    @property
    def moved(self) -> dict[str, float]:
        """That of the columns that have moved, the farthest first."""
        return dict(sorted(moved(self.training_bins, self.bins).items(), key=lambda pair: (-pair[1], pair[0])))

    def lines(self) -> list[str]:
        """One for each column with unfamiliar cells, or two."""
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

    def drift_lines(self) -> list[str]:
        """One for the columns that have moved, the farthest first; none where none has."""
        named = [f"{name!r} ({index:.2f})" for name, index in self.moved.items()]
        if not named:
            return []
        more = f" and {len(named) - _MOST_MOVED} more" if len(named) > _MOST_MOVED else ""
        return [
            "drift against the training rows, population stability index (from 0.25 a model needs attention): "
            + ", ".join(named[:_MOST_MOVED]) + more
        ]  # fmt: skip

    def as_json(self, *, all_drift: bool = False) -> dict[str, dict[str, Any]]:
        """By key; those without a column are left out. `all_drift`: that of columns that have not moved too."""
        found: dict[str, dict[str, Any]] = {
            "unknown_categories": self.unknown,
            "spelled_otherwise": {name: dict(known) for name, known in self.spellings.items()},
            "outside_training_range": self.outside,
            "missing_unlike_training": self.missing,
            "drift": self.drift if all_drift else self.moved,
        }
        return {key: of_columns for key, of_columns in found.items() if of_columns}


def contracts_of(spec: FeatureSpec) -> dict[str, ColumnContract]:
    """What the training rows had, by name of the column that is read."""
    ranged = {name: column for column, name in zip(spec.numeric, spec.columns_of_inputs[0], strict=True)}
    dates = {reading.column for reading in spec.readings if reading.parts}
    found = {}
    for name, column in ranged.items():
        unbounded = name in dates or not column.scale or not column.quantiles  # a scale of 0: the model ignores it
        low, *_, high = (-math.inf, math.inf) if unbounded else column.quantiles
        found[name] = ColumnContract(name=name, had_missing=column.has_missing_flag, low=low, high=high)
    for words in spec.categorical:
        found[words.name] = ColumnContract(name=words.name, had_missing=words.seen_in_training[MISSING])
    return found


def unfamiliar_cells(
    slice_of: Callable[[int, int], tuple[Tensor, ...]], num_rows: int, spec: FeatureSpec, table: pl.DataFrame | None
) -> Unfamiliar:
    """What is unfamiliar in encoded rows; `slice_of` gives the model's inputs of the rows from one number to another.

    Missing numbers, and the texts of unknown categories, are looked for in `table`, the rows before they were encoded.
    """
    contracts, bins = contracts_of(spec), TrainingBins(spec)
    num_outside = torch.zeros(spec.num_numeric, dtype=torch.int64)
    low, high = _range_of_encoded(spec, contracts)
    strangers: dict[str, Counter[str]] = {}
    unknown, missing = (torch.zeros(spec.num_categorical, dtype=torch.int64) for _ in range(2))
    of_bins = Unfamiliar(training_bins=bins.expected)
    made = spec.columns_of_features

    for start in range(0, num_rows, _ROWS_AT_ONCE):
        numeric, flags, codes = slice_of(start, min(num_rows, start + _ROWS_AT_ONCE))
        slack = max(_ROUNDING, 8 * torch.finfo(numeric.dtype).eps)
        num_outside += outside(numeric.cpu().float(), low - slack, high + slack).sum(0)
        is_unknown = (codes == UNKNOWN).cpu()
        unknown += is_unknown.sum(0)
        missing += (codes == MISSING).sum(0).cpu()
        part = None if table is None else table[start : start + _ROWS_AT_ONCE]
        for place in is_unknown.any(0).nonzero().flatten().tolist() if part is not None else ():
            assert part is not None
            name = spec.categorical[place].name
            cells = part[name].filter(pl.Series(is_unknown[:, place].numpy()))
            strangers.setdefault(name, Counter()).update(cells.cast(pl.String, strict=False).drop_nulls().to_list())
        of_bins += Unfamiliar(bins=bins.counts((numeric, flags, codes), _missing_in(part, made)))
        if part is not None:
            num_outside += _outside_by_cells(part, numeric.cpu().float(), spec, contracts, slack)
    names = [column.name for column in spec.categorical]
    missing_cells = dict(zip(names, missing.tolist(), strict=True))
    if table is not None:
        for column in spec.numeric:
            if not column.has_missing_flag:
                name = made.get(column.name, column.name)
                missing_cells[name] = _num_missing(table[name])
    outside_cells = {
        name: cells
        for name, cells in zip(spec.columns_of_inputs[0], num_outside.tolist(), strict=True)
        if math.isfinite(contracts[name].low)
    }
    return Unfamiliar(
        num_rows,
        dict(zip(names, unknown.tolist(), strict=True)),
        missing_cells,
        frozenset(name for name in missing_cells if not contracts[name].had_missing),
        outside_cells,
        {name: _most_frequent(texts) for name, texts in strangers.items()},
        _spellings(spec, strangers),
        of_bins.bins,
        of_bins.training_bins,
    )


def _missing_in(table: pl.DataFrame | None, made: Mapping[str, str]) -> Callable[[str], int]:
    return lambda name: 0 if table is None else _num_missing(table[made.get(name, name)])


def _outside_by_cells(
    table: pl.DataFrame, numeric: Tensor, spec: FeatureSpec, contracts: Mapping[str, ColumnContract], slack: float
) -> Tensor:
    """Numbers outside of the range, (columns,), where all from the ends on are encoded alike: by quantiles."""
    found = torch.zeros(spec.num_numeric, dtype=torch.int64)
    readings = {reading.column: reading for reading in spec.readings}
    for place, (column, name) in enumerate(zip(spec.numeric, spec.columns_of_inputs[0], strict=True)):
        contract = contracts[name]
        if column.transform == "robust" or not column.scale or not math.isfinite(contract.low):
            continue
        at_ends = numeric[:, place].abs() >= LARGEST_NORMAL * (1 - slack)
        if at_ends.any():
            cells = table.select(name).filter(pl.Series(at_ends.numpy()))
            read = with_features(cells, [readings[name]] if name in readings else [], "the table")
            found[place] = outside(numbers(read[column.name], "the table"), contract.low, contract.high).sum()
    return found


def _range_of_encoded(spec: FeatureSpec, contracts: Mapping[str, ColumnContract]) -> tuple[Tensor, Tensor]:
    """What the smallest and the largest training number of each column are encoded as, (columns,) each.

    Without bound where that does not tell numbers outside from them: one that is encoded by its quantiles, and one
    without a range.
    """
    low, high = (torch.full((spec.num_numeric,), bound) for bound in (-torch.inf, torch.inf))
    for place, (column, name) in enumerate(zip(spec.numeric, spec.columns_of_inputs[0], strict=True)):
        contract = contracts[name]
        if column.transform == "robust" and math.isfinite(contract.low):
            ends = scaled(torch.tensor([contract.low, contract.high], dtype=torch.float64), column)
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
