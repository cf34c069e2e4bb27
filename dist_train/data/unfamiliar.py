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
    """Shares of the cells by name of the column, the columns with many such cells only.

    `unknown`: of the cells that are there, those with a category that is not in the vocabulary. `missing`: of all
    cells, those that are missing, in columns that had no missing cell in training.
    """

    unknown: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)

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
    if not num_rows:
        return Unfamiliar()
    unknown, missing = (torch.zeros(spec.num_categorical, dtype=torch.int64) for _ in range(2))
    for start in range(0, num_rows if spec.num_categorical else 0, _ROWS_AT_ONCE):
        codes = slice_of(start, min(num_rows, start + _ROWS_AT_ONCE))[2]
        unknown += (codes == UNKNOWN).sum(0).cpu()
        missing += (codes == MISSING).sum(0).cpu()
    names = [column.name for column in spec.categorical]
    of_present = unknown / (num_rows - missing).clamp(min=1)
    without = [not column.seen_in_training[MISSING] for column in spec.categorical]
    shares = zip(names, (missing / num_rows).tolist(), without, strict=True)
    missing_shares = {name: share for name, share, applies in shares if applies}
    if table is not None:
        made = spec.columns_of_features
        for column in spec.numeric:
            if not column.has_missing_flag:
                name = made.get(column.name, column.name)
                missing_shares[name] = _num_missing(table[name]) / num_rows
    return Unfamiliar(_many(dict(zip(names, of_present.tolist(), strict=True))), _many(missing_shares))


def _many(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: share for name, share in shares.items() if share >= MANY}


def _num_missing(column: pl.Series) -> int:
    return column.null_count() + (int(column.is_nan().sum()) if column.dtype.is_float() else 0)
