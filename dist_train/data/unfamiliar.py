"""Cells that a model has not seen the like of in training: unknown categories, and missing cells where none were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import polars as pl
import torch
from torch import Tensor

from dist_train.data.spec import MISSING, UNKNOWN, FeatureSpec

_ROWS_AT_ONCE = 1 << 16
# A column is named from this share of its cells on.
MANY = 0.1


@dataclass(frozen=True)
class Unfamiliar:
    """Counts of unfamiliar cells by name of the column; `+` is of the rows of both, which have the same columns.

    `unknown_cells` are categories that are not in the vocabulary, `missing_cells` the missing cells of every column
    that is counted; `never_missing` are the columns that had no missing cell in training.
    """

    rows: int = 0
    unknown_cells: Mapping[str, int] = field(default_factory=dict)
    missing_cells: Mapping[str, int] = field(default_factory=dict)
    never_missing: frozenset[str] = frozenset()

    def __add__(self, other: Unfamiliar) -> Unfamiliar:
        return Unfamiliar(
            self.rows + other.rows,
            _sums(self.unknown_cells, other.unknown_cells),
            _sums(self.missing_cells, other.missing_cells),
            self.never_missing | other.never_missing,
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

    def lines(self) -> list[str]:
        """One for each column that is named."""
        return [
            *(f"column {name!r}: {share:.0%} of the cells are categories that the model does not know"
              for name, share in self.unknown.items()),
            *(f"column {name!r}: {share:.0%} of the cells are missing, and none was in training"
              for name, share in self.missing.items()),
        ]  # fmt: skip

    def as_json(self) -> dict[str, dict[str, float]]:
        """By key; those without a column are left out."""
        shares = {"unknown_categories": dict(self.unknown), "missing_unlike_training": dict(self.missing)}
        return {key: of_columns for key, of_columns in shares.items() if of_columns}


def unfamiliar_cells(
    slice_of: Callable[[int, int], tuple[Tensor, ...]], num_rows: int, spec: FeatureSpec, table: pl.DataFrame | None
) -> Unfamiliar:
    """What is unfamiliar in encoded rows; `slice_of` gives the model's inputs of the rows from one number to another.

    Missing numbers are looked for in `table`, the rows before they were encoded.
    """
    unknown, missing = (torch.zeros(spec.num_categorical, dtype=torch.int64) for _ in range(2))
    for start in range(0, num_rows if spec.num_categorical else 0, _ROWS_AT_ONCE):
        codes = slice_of(start, min(num_rows, start + _ROWS_AT_ONCE))[2]
        unknown += (codes == UNKNOWN).sum(0).cpu()
        missing += (codes == MISSING).sum(0).cpu()
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
    return Unfamiliar(num_rows, unknown_cells, missing_cells, frozenset(never_missing))


def _sums(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _many(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: share for name, share in shares.items() if share >= MANY}


def _num_missing(column: pl.Series) -> int:
    return column.null_count() + (int(column.is_nan().sum()) if column.dtype.is_float() else 0)
