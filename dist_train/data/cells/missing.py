"""Cells that mean: no value. A word means it in each type that has its value: -999 as a float, 1900-01-01 as a date."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import polars as pl

from dist_train.data.cells.spelling import canonical_moment, canonical_plain_number

_INFINITE = {"inf", "infinity"}


def without_missing_words(column: pl.Series, words: Sequence[str], categories: Collection[str] = ()) -> pl.Series:
    """A column whose cells are null where they are one of the words that mean: no value.

    A text is one by its letters; a text, a number or a date is one by its value. A word that is among the `categories`
    stays: a former release took it for one in a Parquet file.
    """
    missing = [word for word in words if word not in categories]
    valued = words_with_value(missing)
    if column.dtype == pl.Null or not (valued or (missing and column.dtype == pl.String)):
        return column
    found = column.is_in(missing) if column.dtype == pl.String else pl.repeat(False, len(column), eager=True)
    for meant in _cells_by_value(column, valued):
        found = found | meant
    return column.set(found, None) if found.any() else column


def words_with_value(words: Sequence[str]) -> list[str]:
    """Those of the words that are numbers or dates: a reader of text does not find them in another spelling."""
    return [word for word in words if _number(word) is not None or canonical_moment(word) is not None]


def _cells_by_value(column: pl.Series, words: Sequence[str]) -> list[pl.Series]:
    """Per kind of word, which cells have the value of one."""
    numbers = {_number(word) for word in words} - {None}
    moments = {canonical_moment(word) for word in words} - {None}
    found = []
    if numbers and (column.dtype.is_numeric() or column.dtype == pl.String):
        near = column.cast(pl.Float64, strict=False).is_in([float(number) for number in numbers if number])
        if near.any():  # float64 may take two large integers for one, their digits do not
            found.append(_is_one_of(column, near, [text for text in _texts(column, near) if _number(text) in numbers]))
    if moments and column.dtype in (pl.Date, pl.Datetime, pl.String):
        there = column.is_not_null()
        same = [text for text in _texts(column, there) if canonical_moment(text) in moments]
        found.append(_is_one_of(column, there, same))
    return found


def _texts(column: pl.Series, chosen: pl.Series) -> list[str]:
    return column.filter(chosen).unique().cast(pl.String).to_list()


def _is_one_of(column: pl.Series, candidates: pl.Series, texts: Sequence[str]) -> pl.Series:
    if not texts:
        return pl.repeat(False, len(column), eager=True)
    return candidates.fill_null(False) & column.cast(pl.String).is_in(texts).fill_null(False)


def _number(text: str) -> str | None:
    """The canonical text of a number, an infinite one as well."""
    word = text.strip()
    if word.lstrip("+-").lower() in _INFINITE:
        return "-inf" if word.startswith("-") else "inf"
    return canonical_plain_number(word)
