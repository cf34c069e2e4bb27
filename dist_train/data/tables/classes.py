"""The target: cells -> class names in a fixed order -> class indices. UserError on what cannot be a class."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import polars as pl
import torch
from torch import Tensor

from dist_train.data.cells.spelling import alike
from dist_train.data.tables.table import as_text
from dist_train.errors import UserError

MAX_CLASSES = 1000


def target_text(column: pl.Series, source: str, first_row: int = 0) -> pl.Series:
    """A target column as text; UserError when a cell is missing. It begins with row `first_row` of the source."""
    text = as_text(column, source)
    if text.null_count():
        row = first_row + int(text.is_null().arg_max() or 0)
        raise UserError(
            f"{source}: the target {column.name!r} is missing in data row {row + 1}: mend the cell or leave the row out"
        )
    return text


def first_rows(text: pl.Series) -> dict[str, int]:
    """The row in which each text occurs first."""
    rows = text.arg_unique().sort()
    return dict(zip(text[rows].to_list(), rows.to_list(), strict=True))


def check_whole(places: Mapping[str, tuple[str, int]], target: str) -> None:
    """UserError when the texts of a target are numbers throughout, and not all of them whole: a quantity.

    The same column of a CSV file comes as text. `places` holds source and row of each text's first occurrence.
    """
    fractions = [text for text in places if not re.fullmatch("[+-]?[0-9]+", text)]
    if fractions and all(_is_number(text) for text in places):
        source, row = min((places[text] for text in fractions), key=lambda place: place[1])
        text = next(text for text in fractions if places[text] == (source, row))
        raise UserError(
            f"{source}: the target {target!r} holds fractions ({text} in data row {row + 1}): "
            "a class is text or a whole number"
        )


def ordered_names(names: Iterable[str], target: str, source: str) -> list[str]:
    """Class names in their order: that of numbers where all are whole numbers, else of the alphabet."""
    names = list(names)
    if len(names) < 2:
        raise UserError(f"{source}: the target {target!r} has only one class, {names[0]!r}: there is nothing to learn")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{source}: the target {target!r} has {len(names)} distinct values: is it a class?")
    whole = all(re.fullmatch("-?[0-9]{1,18}", name) for name in names)
    key: Callable[[str], tuple[int, str]] | None = (lambda name: (int(name), name)) if whole else None
    return sorted(names, key=key)


def index_of_classes(class_names: Sequence[str], texts: Iterable[str] = ()) -> dict[str, int]:
    """Index of each class by its name, and by those of the `texts` that mean a class: 1 where `true` is one."""
    index = {name: number for number, name in enumerate(class_names)}
    return index | alike([text for text in texts if text not in index], class_names, typed=False)


def class_indices(text: pl.Series, class_names: Iterable[str]) -> Tensor:
    """Index of each cell's class, (rows,) int64; every cell must be a class."""
    order = {name: index for index, name in enumerate(class_names)}
    return torch.from_numpy(text.replace_strict(order, return_dtype=pl.Int64).to_numpy(writable=True))


def check_training_rows(counts: Tensor, class_names: list[str], source: str) -> None:
    """UserError when the training rows of each class, (classes,), are too few to train on."""
    total = int(counts.sum())
    if total < 2:
        raise UserError(f"{source}: {total} training rows are left after the split: at least 2 are needed")
    if (counts == 0).any():
        raise UserError(f"{source}: class {class_names[int(counts.argmin())]!r} has no training rows")


def _is_number(text: str) -> bool:
    return pl.Series([text]).str.strip_chars().cast(pl.Float64, strict=False).is_not_null().all()
