"""Columns of a table as numbers or categories, for analysis."""

from __future__ import annotations

from collections.abc import Collection

import polars as pl


def typed(table: pl.DataFrame, categorical: Collection[str] = ()) -> pl.DataFrame:
    """Numbers as float64, everything else as text.

    A column of text whose every cell is a number is one, as those of a CSV file; a date is the number of its days, a
    time of its microseconds. Columns in `categorical` and truth values are text.
    """
    return table.select(_typed(table[name], name in categorical) for name in table.columns)


def _typed(column: pl.Series, categorical: bool) -> pl.Series:
    if categorical or column.dtype == pl.Boolean:
        return column.cast(pl.String)
    if column.dtype.is_numeric():
        return column.cast(pl.Float64)
    if column.dtype.is_temporal():
        return column.to_physical().cast(pl.Float64)
    text = column.cast(pl.String, strict=False)
    numbers = text.cast(pl.Float64, strict=False)
    return numbers if numbers.null_count() == text.null_count() < len(text) else text
