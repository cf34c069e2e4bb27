"""Weights of rows: how much each one counts in the loss and in every metric."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from dist_train.data.tables.table import FLOAT32_MAX, parse_numbers
from dist_train.errors import UserError


def weights_of_column(column: pl.Series, source: str, first_row: int = 0) -> Tensor:
    """Weights, (rows,) float64: finite and at least 0. The column begins with row `first_row` of the source.

    Raises:
        UserError: a cell is missing, no number, negative, infinite, or beyond float32.
    """
    parsed = parse_numbers(column).fill_null(float("nan"))
    weights = torch.from_numpy(parsed.to_numpy(writable=True))
    broken = ~((weights >= 0) & (weights <= FLOAT32_MAX))
    if broken.any():
        row = int(broken.int().argmax())
        cell = "the cell is missing" if column[row] is None else f"{column[row]!r} is no weight"
        raise UserError(
            f"{source}: column {column.name!r}, data row {first_row + row + 1}: {cell}; data.weight needs a finite "
            "number of at least 0 in each row"
        )
    return weights


def require_some_weight(weights: Tensor | None, column: str | None, source: str, split: str) -> None:
    """Check that the rows of a split do not all have weight 0.

    Raises:
        UserError: they do: neither a loss nor a metric of them is defined.
    """
    if weights is not None and len(weights) and not weights.any():
        raise UserError(f"{source}: column {column!r}: the weight of every {split} row is 0 (data.weight)")
