"""Which rows train, which validate, which test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from dist_train.data.quantiles import order_statistics
from dist_train.determinism.keyed_random import uniform_keys
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError

SPLITS = ("train", "valid", "test")
_TRAIN, _VALID, _TEST = range(len(SPLITS))
_SPELLINGS = {"train": _TRAIN, "valid": _VALID, "val": _VALID, "validation": _VALID, "test": _TEST}
# Integers pass as well: the refusal of their first cell says more than one of their type.
_TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)
_SIGN_BIT = torch.iinfo(torch.int64).min

Split = dict[str, Tensor]
"""Row numbers (int64, ascending) by name of the split."""


def codes_of_column(column: pl.Series, source: str, first_row: int = 0) -> Tensor:
    """Index in SPLITS of each row, uint8, as a column says it: train; valid, val or validation; test.

    UserError on anything else; the column begins with row `first_row` of the source.
    """
    if not (column.dtype.is_integer() or column.dtype in _TEXT):
        raise UserError(
            f"{source}: column {column.name!r} has type {column.dtype}: a split is text: train, valid or test"
        )
    codes = column.cast(pl.String).str.to_lowercase().replace_strict(_SPELLINGS, default=None, return_dtype=pl.UInt8)
    if codes.null_count():
        row = int(codes.is_null().arg_max() or 0)
        raise UserError(
            f"{source}: column {column.name!r}, data row {first_row + row + 1}: {column[row]!r} is not a split; "
            "train, valid (val, validation) and test are"
        )
    return torch.from_numpy(codes.to_numpy(writable=True))


@dataclass(frozen=True)
class FractionSplit:
    """Stratified split: in each class, rows go to test, then to valid, in the order of a hash of (seed, row number).

    A row's hash does not depend on the other rows, and the shares of each class are exact to one row. `last_keys` holds
    for each class the hash of its last test row and of its last valid row, and `any_rows` whether there are such,
    both (classes, 2).
    """

    seed: int
    last_keys: Tensor
    any_rows: Tensor

    @classmethod
    def fit(
        cls,
        pieces: Callable[[], Iterable[tuple[int, Tensor]]],
        num_classes: int,
        collectives: Collectives,
        *,
        validation_fraction: float,
        test_fraction: float,
        seed: int,
    ) -> FractionSplit:
        """`pieces` gives this rank's rows in parts, as often as it is asked: the first row's number, and classes."""
        borders = torch.zeros((num_classes, 2), dtype=torch.int64)

        def keys() -> Iterator[list[tuple[Tensor, Tensor | int]]]:
            for first_row, classes in pieces():
                yield [(_keys(seed, first_row, len(classes)) ^ _SIGN_BIT, classes.long())]

        def places(totals: Tensor) -> Tensor:
            for index, count in enumerate(totals.tolist()):
                num_test = round(count * test_fraction)
                borders[index] = torch.tensor([num_test, num_test + round(count * validation_fraction)])
            return (borders - 1).clamp(min=0)

        found = order_statistics(keys, num_classes, places, collectives)
        return cls(seed, found ^ _SIGN_BIT, borders > 0)

    def codes(self, first_row: int, classes: Tensor) -> Tensor:
        """Index in SPLITS of each of the rows from `first_row` on, uint8, by their class indices."""
        classes = classes.long()
        keys = _keys(self.seed, first_row, len(classes)).unsqueeze(1)
        within = (keys <= self.last_keys[classes]) & self.any_rows[classes]
        codes = torch.full((len(classes),), _TRAIN, dtype=torch.uint8)
        codes[within[:, 1]] = _VALID
        codes[within[:, 0]] = _TEST
        return codes


def split_of_codes(codes: Tensor) -> Split:
    """Row numbers of each split."""
    return {name: (codes == index).nonzero().squeeze(1) for index, name in enumerate(SPLITS)}


def split_by_column(column: pl.Series, source: str) -> Split:
    """Split as a column says it."""
    return split_of_codes(codes_of_column(column, source))


def split_by_fraction(classes: Tensor, *, validation_fraction: float, test_fraction: float, seed: int) -> Split:
    """Stratified split of a whole table; `classes` holds the class index of every row, (rows,)."""
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    split = FractionSplit.fit(
        lambda: [(0, classes)], int(classes.max()) + 1, Collectives(World()), **fractions, seed=seed
    )
    return split_of_codes(split.codes(0, classes))


def _keys(seed: int, first_row: int, num_rows: int) -> Tensor:
    return uniform_keys(num_rows, "split", seed, first_row=first_row)
