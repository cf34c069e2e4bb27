"""Which rows train, which validate, which test."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from dist_train.errors import UserError
from dist_train.runtime.keyed_random import uniform_keys

SPLITS = ("train", "valid", "test")
_SPELLINGS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
# Integers pass as well: the refusal of their first cell says more than one of their type.
_TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)

Split = dict[str, Tensor]
"""Row numbers (int64, ascending) by name of the split."""


def split_by_column(column: pl.Series, source: str) -> Split:
    """Split as a column says it: train; valid, val or validation; test. UserError on anything else."""
    if not (column.dtype.is_integer() or column.dtype in _TEXT):
        raise UserError(
            f"{source}: column {column.name!r} has type {column.dtype}: a split is text: train, valid or test"
        )
    names = column.cast(pl.String).str.to_lowercase().replace_strict(_SPELLINGS, default=None, return_dtype=pl.String)
    if names.null_count():
        row = int(names.is_null().arg_max() or 0)
        raise UserError(
            f"{source}: column {column.name!r}, data row {row + 1}: {column[row]!r} is not a split; "
            "train, valid (val, validation) and test are"
        )
    return {name: torch.from_numpy((names == name).arg_true().to_numpy().astype("int64")) for name in SPLITS}


def split_by_fraction(classes: Tensor, *, validation_fraction: float, test_fraction: float, seed: int) -> Split:
    """Stratified split: in each class, rows go to test, then to valid, in the order of a hash of (seed, row number).

    A row's hash does not depend on the other rows, and the shares of each class are exact to one row.
    `classes` holds the class index of every row, (rows,).
    """
    keys = uniform_keys(len(classes), "split", seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in SPLITS}
    for index in range(int(classes.max()) + 1):
        rows = (classes == index).nonzero().squeeze(1)
        rows = rows[keys[rows].argsort(stable=True)]
        num_test = round(len(rows) * test_fraction)
        num_valid = round(len(rows) * validation_fraction)
        parts["test"].append(rows[:num_test])
        parts["valid"].append(rows[num_test : num_test + num_valid])
        parts["train"].append(rows[num_test + num_valid :])
    return {name: torch.cat(rows).sort().values for name, rows in parts.items()}
