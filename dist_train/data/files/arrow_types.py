"""Columns of Arrow -> columns of polars, also those of types that polars does not take."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
import pyarrow.compute
from polars.exceptions import PanicException, PolarsError

from dist_train.errors import UserError


def frame_of_arrow(batch: pa.RecordBatch | pa.Table, source: str) -> pl.DataFrame:
    """The columns by name: text, numbers, booleans, dates; other types as they are.

    Dictionaries and runs are decoded, texts that are stored as bytes become text, and times with a zone become UTC:
    the same instant, whichever zone they are shown in.

    Raises:
        UserError: a column's type cannot be read; it is named.
    """
    names = batch.schema.names
    columns = [_readable(column) for column in batch.columns]
    try:
        frame = pl.from_arrow(pa.table(columns, names=names))
        assert isinstance(frame, pl.DataFrame)
    except (pa.ArrowException, PolarsError, PanicException):
        raise UserError(f"{source}: {_what_is_unreadable(names, columns, batch.schema.types)}") from None
    text = [name for name, dtype in frame.schema.items() if isinstance(dtype, (pl.Categorical, pl.Enum))]
    return frame.with_columns(pl.col(text).cast(pl.String)) if text else frame


def _what_is_unreadable(names: Sequence[str], columns: Sequence[pa.Array], types: Sequence[pa.DataType]) -> str:
    for name, column, dtype in zip(names, columns, types, strict=True):
        try:
            pl.from_arrow(column)
        except (pa.ArrowException, PolarsError, PanicException):
            return f"column {name!r} has type {dtype}, which cannot be read: name it in data.drop"
    return "the columns cannot be read together"


def _readable(column: pa.Array) -> pa.Array:
    dtype = column.type
    if isinstance(dtype, pa.BaseExtensionType):
        storage = column.storage if isinstance(column, pa.Array) else column.cast(dtype.storage_type)
        return storage.cast(pa.bool_()) if dtype.extension_name == "arrow.bool8" else _readable(storage)
    if pa.types.is_run_end_encoded(dtype):
        return _readable(pyarrow.compute.run_end_decode(column))
    if pa.types.is_timestamp(dtype) and dtype.tz is not None:
        return column.cast(pa.timestamp(dtype.unit, "UTC"))
    try:
        if pa.types.is_decimal256(dtype):
            return column.cast(pa.decimal128(38, dtype.scale))
        if pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_binary_view(dtype):
            return column.cast(pa.large_string())
    except pa.ArrowInvalid:  # too many digits, or bytes that are no text
        return column.cast(pa.float64()) if pa.types.is_decimal256(dtype) else column
    return column
