"""Tables that a program hands over: DataFrames, records, columns and arrays -> a polars DataFrame."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from dist_train.data.files.arrow_types import frame_of_arrow
from dist_train.errors import UserError

Table = Any
"""A DataFrame of polars, pandas or pyarrow; a list of records (dicts); a dict of columns; a NumPy array of two axes."""

# Types of columns that are text in a CSV file.
_AS_TEXT = (pl.Categorical, pl.Enum)


def frame_of(table: Table, names: Sequence[str] | None = None, wanted: Sequence[str] | None = None) -> pl.DataFrame:
    """The rows in their order, with the types that a Parquet file of them would have. Nothing is written.

    `names` are those of the columns of an array, which has none itself. Only the `wanted` columns of a DataFrame or a
    dict are looked at, where they are given.

    Raises:
        UserError: the object is not a table, or a column holds values of several types.
    """
    frame = _frame_of(table, names, None if wanted is None else frozenset(wanted))
    return frame.with_columns(
        frame[name].cast(pl.String) for name, dtype in frame.schema.items() if isinstance(dtype, _AS_TEXT)
    )


def is_dataframe(table: object) -> bool:
    """Whether an object has named columns: a DataFrame of polars, pandas or another library."""
    return hasattr(table, "columns") and hasattr(table, "shape")


def _frame_of(table: Table, names: Sequence[str] | None, wanted: Collection[str] | None) -> pl.DataFrame:
    if isinstance(table, (pl.DataFrame, pl.LazyFrame)):
        frame = table.lazy().collect()
        return frame if wanted is None else frame.select(name for name in frame.columns if name in wanted)
    try:
        if isinstance(table, Mapping):
            return pl.DataFrame(_of(table, wanted))
        if isinstance(table, np.ndarray):
            return _frame_of_array(table, names)
        if isinstance(table, Sequence) and not isinstance(table, (str, bytes, os.PathLike)):
            return _frame_of_records(table, wanted)
        if is_dataframe(table) or hasattr(table, "__arrow_c_stream__"):
            return _frame_of_dataframe(table, wanted)
    except (pl.exceptions.PolarsError, pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the rows cannot be read as a table: {_first_line(error)}") from None
    raise UserError(
        f"a {type(table).__name__} is not a table: give a DataFrame, a list of records, a dict of columns, or the path "
        "of a CSV, JSON lines or Parquet file"
    )


def _of(columns: Mapping[Any, Any], wanted: Collection[str] | None) -> dict[str, Any]:
    _require_single(columns)
    return {str(name): values for name, values in columns.items() if wanted is None or str(name) in wanted}


def _require_single(names: Iterable[Any]) -> None:
    seen: set[str] = set()
    for name in map(str, names):
        if name in seen:
            raise UserError(f"two columns are named {name!r}")
        seen.add(name)


def _frame_of_records(records: Sequence[Any], wanted: Collection[str] | None) -> pl.DataFrame:
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise UserError(f"record {number} is a {type(record).__name__}, not a dict of column names and values")
    return pl.DataFrame([_of(record, wanted) for record in records], infer_schema_length=None)


def _frame_of_dataframe(table: Any, wanted: Collection[str] | None) -> pl.DataFrame:
    if type(table).__module__.partition(".")[0] != "pandas":
        return _frame_of(pl.DataFrame(table), None, wanted)
    _require_single(table.columns)
    columns = [(str(name), column) for name, column in table.items() if wanted is None or str(name) in wanted]
    arrays = [_array_of(name, column) for name, column in columns]
    return frame_of_arrow(pa.table(arrays, names=[name for name, _ in columns]), "the table")


def _array_of(name: str, column: Any) -> pa.Array:
    try:
        return pa.array(column, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the rows cannot be read as a table: column {name!r}: {_first_line(error)}") from None


def _frame_of_array(array: Any, names: Sequence[str] | None) -> pl.DataFrame:
    if array.ndim != 2 or names is None:
        raise UserError("an array has no names of columns: give a DataFrame, records or a dict of columns")
    return pl.DataFrame([_column(name, array[:, index]) for index, name in enumerate(names)])


def _column(name: str, values: Any) -> pl.Series:
    """One column of an array; one of objects is numbers where all of its cells are, else text."""
    if values.dtype.kind == "b":
        return pl.Series(name, values)
    if values.dtype.kind in "iuf":
        return pl.Series(name, values if values.dtype.itemsize > 2 else values.astype(np.float64))
    if values.dtype.kind in "US":
        return pl.Series(name, values.astype(str).tolist(), dtype=pl.String)
    cells = [None if cell is None or cell != cell else cell for cell in values.tolist()]  # NaN is not itself
    if all(cell is None or isinstance(cell, str) for cell in cells):
        return pl.Series(name, cells, dtype=pl.String)
    try:
        return pl.Series(name, [None if cell is None else float(cell) for cell in cells], dtype=pl.Float64)
    except (TypeError, ValueError):
        raise UserError(f"column {name!r} holds values that are neither all numbers nor all text") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
