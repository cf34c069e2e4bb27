"""Which rows train, which validate, which test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
IN_NONE = len(SPLITS)
"""Code of a row that is in no split: in a fold in time, a row after those that validate."""
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
class Parts:
    """The parts that a table is cut into, and which split each of them is.

    The first part is test. Without folds the second one validates, and the third one trains. With K folds (`folds`)
    there are K more parts; that of `fold` validates, the others train. In time (`in_time`) the parts come from the
    latest to the earliest: with K folds there are K + 1 windows beside the test rows, and fold i trains on the i + 1
    earliest ones and validates on the next one.
    """

    validation_fraction: float
    test_fraction: float
    folds: int | None = None
    fold: int | None = None
    in_time: bool = False

    def borders(self, count: int) -> list[int]:
        """Rows of the first part, of the first two, and so on, of `count` rows; those of all are left out."""
        num_test = round(count * self.test_fraction)
        if self.folds is None:
            return [num_test, num_test + round(count * self.validation_fraction)]
        windows = self.folds + self.in_time
        return [num_test + round((count - num_test) * i / windows) for i in range(windows)]

    @property
    def codes(self) -> Tensor:
        """Index in SPLITS of each part, or IN_NONE, uint8."""
        if self.folds is None:
            return torch.tensor([_TEST, _VALID, _TRAIN], dtype=torch.uint8)
        assert self.fold is not None  # the rules of a configuration
        if not self.in_time:
            of_folds = [_VALID if fold == self.fold else _TRAIN for fold in range(self.folds)]
        else:
            later = self.folds - 1 - self.fold
            of_folds = [IN_NONE] * later + [_VALID] + [_TRAIN] * (self.fold + 1)
        return torch.tensor([_TEST, *of_folds], dtype=torch.uint8)


@dataclass(frozen=True)
class FractionSplit:
    """Stratified parts: in each class, rows go to the first part, then to the next, by a hash of (seed, row number).

    A row's hash does not depend on the other rows, and the shares of each class are exact to one row. `last_keys` holds
    for each class the hash of the last row of each part but the last one, counted from the first part on, and
    `any_rows` whether there is such a row, both (classes, parts - 1).
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
        borders: Callable[[int], list[int]],
        seed: int,
    ) -> FractionSplit:
        """`pieces` gives this rank's rows in parts, as often as it is asked: the first row's number, and classes.

        Rows of class -1 are in the first part, and not counted. `borders` are those of `Parts`.
        """
        num_borders = len(borders(0))
        ends = torch.zeros((num_classes, num_borders), dtype=torch.int64)

        def keys() -> Iterator[list[tuple[Tensor, Tensor | int]]]:
            for first_row, classes in pieces():
                of_rows, counted = _keys(seed, first_row, len(classes)) ^ _SIGN_BIT, classes >= 0
                yield [(of_rows[counted], classes[counted].long())]

        def places(totals: Tensor) -> Tensor:
            for index, count in enumerate(totals.tolist()):
                ends[index] = torch.tensor(borders(count))
            return (ends - 1).clamp(min=0)

        found = order_statistics(keys, num_classes, places, collectives)
        return cls(seed, found ^ _SIGN_BIT, ends > 0)

    def parts(self, first_row: int, classes: Tensor) -> Tensor:
        """Part of each of the rows from `first_row` on, int64, by their class indices; -1 is a row of the first one."""
        classes = classes.long()
        keys = _keys(self.seed, first_row, len(classes)).unsqueeze(1)
        within = (keys <= self.last_keys[classes]) & self.any_rows[classes]
        return (~within & (classes >= 0).unsqueeze(1)).sum(1)

    def pack(self) -> dict[str, Any]:
        """As JSON types; `unpack` reads it."""
        return {"seed": self.seed, "last": self.last_keys.tolist(), "any": self.any_rows.tolist()}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> FractionSplit:
        """What `pack` packed."""
        return cls(packed["seed"], torch.tensor(packed["last"]), torch.tensor(packed["any"]))


def split_of_codes(codes: Tensor) -> Split:
    """Row numbers of each split."""
    return {name: (codes == index).nonzero().squeeze(1) for index, name in enumerate(SPLITS)}


def split_by_column(column: pl.Series, source: str) -> Split:
    """Split as a column says it."""
    return split_of_codes(codes_of_column(column, source))


def split_by_fraction(classes: Tensor, *, validation_fraction: float, test_fraction: float, seed: int) -> Split:
    """Stratified split of a whole table; `classes` holds the class index of every row, (rows,)."""
    parts = Parts(validation_fraction, test_fraction)
    split = FractionSplit.fit(
        lambda: [(0, classes)], int(classes.max()) + 1, Collectives(World()), borders=parts.borders, seed=seed
    )
    return split_of_codes(parts.codes[split.parts(0, classes)])


def _keys(seed: int, first_row: int, num_rows: int) -> Tensor:
    return uniform_keys(num_rows, "split", seed, first_row=first_row)
