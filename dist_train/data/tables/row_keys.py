"""Times and groups of rows as 64-bit numbers, for splits that follow them."""

from __future__ import annotations

import hashlib

import polars as pl
import torch
from torch import Tensor

from dist_train.data.tables.table import as_text
from dist_train.errors import UserError

INTEGERS, TIMES = "whole numbers", "dates"
"""What a time column can hold; the two have no common order."""

# ISO 8601: a month, a date, or a date with a time of day, which may have a fraction and an offset from UTC.
_ISO = (
    r"^([0-9]{4}-[0-9]{2})(-[0-9]{2})?"
    r"(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.,]([0-9]{1,9}))?)?)?[ ]?(Z|[+-][0-9]{2}(?::?[0-9]{2})?)?$"
)
_DAY_MICROSECONDS = 86_400_000_000


def time_keys(column: pl.Series, source: str, first_row: int = 0) -> tuple[Tensor, str]:
    """Numbers in the order of the times of a column, (rows,) int64; and whether they are INTEGERS or TIMES.

    A column holds dates, timestamps (microseconds count, an offset leads to UTC), whole numbers, or text that is
    either of them in every cell, dates as in ISO 8601. It begins with row `first_row` of the source.

    Raises:
        UserError: a cell is missing or is no time.
    """
    kind, keys = _temporal_or_integer(column, source)
    _refuse_missing(column, "time", source, first_row)
    if keys.null_count():
        row = int(keys.is_null().arg_max() or 0)
        raise UserError(
            f"{source}: column {column.name!r}, data row {first_row + row + 1}: {column[row]!r} is no time: the time "
            "column must hold dates, timestamps (2024-12-31, 2024-12-31T23:59:00) or whole numbers"
        )
    return torch.from_numpy(keys.to_numpy(writable=True)), kind


def group_keys(column: pl.Series, source: str, first_row: int = 0) -> Tensor:
    """A number for each row that is the same for equal cells, (rows,) int64: a hash of the cell as text.

    Raises:
        UserError: a cell is missing.
    """
    text = as_text(column, source)
    _refuse_missing(text, "group", source, first_row)
    distinct = text.unique().to_list()
    hashes = [
        int.from_bytes(hashlib.blake2b(cell.encode(), digest_size=8).digest(), "little", signed=True)
        for cell in distinct
    ]
    keys = text.replace_strict(distinct, hashes, return_dtype=pl.Int64)
    return torch.from_numpy(keys.to_numpy(writable=True))


def _refuse_missing(column: pl.Series, what: str, source: str, first_row: int) -> None:
    missing = column.is_null() | column.is_nan() if column.dtype.is_float() else column.is_null()
    if missing.any():
        row = first_row + int(missing.arg_max() or 0)
        raise UserError(
            f"{source}: the {what} {column.name!r} is missing in data row {row + 1}: mend the cell or leave the row out"
        )


def _temporal_or_integer(column: pl.Series, source: str) -> tuple[str, pl.Series]:
    dtype = column.dtype
    if dtype == pl.Date:
        return TIMES, column.cast(pl.Int64) * _DAY_MICROSECONDS
    if isinstance(dtype, pl.Datetime):
        return TIMES, column.dt.epoch("us")
    if dtype.is_integer():
        return INTEGERS, column.cast(pl.Int64, strict=False)
    if dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        return INTEGERS, whole.set(whole.cast(pl.Float64) != column.cast(pl.Float64), None)
    if dtype not in (pl.String, pl.Null):
        raise UserError(
            f"{source}: column {column.name!r} has type {dtype}: the time column must hold dates, timestamps or whole "
            "numbers"
        )
    text = column.cast(pl.String).str.strip_chars()
    whole = text.cast(pl.Int64, strict=False)
    if whole.null_count() == text.null_count():
        return INTEGERS, whole
    return TIMES, _iso_microseconds(text)


def _iso_microseconds(text: pl.Series) -> pl.Series:
    """Microseconds since 1970 of ISO texts, null for any other text."""
    cells = pl.DataFrame({"text": text}).select(
        pl.col("text").str.extract_groups(_ISO).struct.rename_fields(["month", "day", "h", "m", "s", "f", "zone"])
    )
    parts = cells.unnest("text").with_columns(pl.col("day").fill_null("-01"), pl.col("zone").str.replace("Z", "+00"))
    hours, minutes, seconds = (pl.col(name).fill_null("0").cast(pl.Int64) for name in ("h", "m", "s"))
    fraction = pl.col("f").fill_null("0").str.pad_end(9, "0").cast(pl.Int64) // 1000
    days = (pl.col("month") + pl.col("day")).str.to_date("%Y-%m-%d", strict=False).cast(pl.Int64)
    sign = pl.when(pl.col("zone").str.starts_with("-")).then(-1).otherwise(1)
    of_zone = [pl.col("zone").str.replace(":", "").str.slice(*place).replace("", "0") for place in ((1, 2), (3, 2))]
    zone_hours, zone_minutes = (part.fill_null("0").cast(pl.Int64) for part in of_zone)
    offset = sign * (zone_hours * 60 + zone_minutes)
    of_day = ((hours * 60 + minutes - offset) * 60 + seconds) * 1_000_000 + fraction
    sound = (hours < 24) & (minutes < 60) & (seconds < 60)
    keys = parts.select(pl.when(sound).then(days * _DAY_MICROSECONDS + of_day).alias("keys"))
    return keys["keys"]
