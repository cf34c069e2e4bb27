"""CSV and Parquet files -> typed columns. Whatever is wrong with a file is one line that names file, column and row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from polars.exceptions import PanicException, PolarsError
from torch import Tensor

from dist_train.errors import Stopped, UserError

BUILTIN = "builtin:"
FLOAT32_MAX = torch.finfo(torch.float32).max

# A text column in which at least this share of the cells are numbers is a column of numbers with stray text in it.
MOSTLY_NUMBERS = 0.5

_MAX_HEADER_BYTES = 1 << 20
_MAX_REASON = 300


@dataclass(frozen=True)
class ColumnKinds:
    """Names of the feature columns by kind, in the order of the table."""

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]


def locate(path: str) -> Path:
    """File behind `data.path`; raises UserError when there is none."""
    if path.startswith(BUILTIN):
        name = path.removeprefix(BUILTIN)
        file = Path(str(resources.files("dist_train.data") / "datasets" / f"{name}.parquet"))
        if not file.is_file():
            raise UserError(f"data.path: there is no built-in data set {name!r}; there is builtin:credit_card_risk")
        return file
    file = Path(path)
    if not file.exists():
        where = "" if file.is_absolute() else f" (looked for in {Path.cwd()})"
        raise UserError(f"{path}: no such file{where}")
    if file.is_dir():
        raise UserError(f"{path}: is a directory, not a CSV or Parquet file")
    return file


def sha256_of(file: Path) -> str:
    """Fingerprint of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_table(file: Path, missing_values: Sequence[str]) -> pl.DataFrame:
    """Read a file whole. CSV cells come as text (null where missing), Parquet columns in their own types."""
    reader = {".csv": _read_csv, ".parquet": _read_parquet, ".pq": _read_parquet}.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: the name must end in .csv or .parquet")
    try:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty")
        return reader(file, missing_values)
    except pa.ArrowCancelled:  # pyarrow ends its work when a signal comes that Python handles
        raise Stopped from None
    except (pa.ArrowException, PolarsError, PanicException, OSError, UnicodeDecodeError) as error:
        if "Empty CSV file" in str(error):
            raise UserError(f"{file}: the table has no rows") from None
        raise UserError(f"{file}: cannot be read as {file.suffix[1:].lower()}: {_reason(error)}") from None


def feature_kinds(
    frame: pl.DataFrame, not_features: Sequence[str], categorical: Sequence[str], source: str
) -> ColumnKinds:
    """Tell numbers from categories: text is categorical unless all of it reads as numbers."""
    features = [name for name in frame.columns if name not in not_features]
    if not features:
        raise UserError(f"{source}: no feature columns are left besides {', '.join(not_features)}")
    numeric = [name for name in features if name not in categorical and _is_numeric(frame[name], source)]
    return ColumnKinds(tuple(numeric), tuple(name for name in features if name not in numeric))


def require_columns(frame: pl.DataFrame, names: Sequence[str], source: str, why: str) -> None:
    """UserError when a column is not there, with the nearest hint there is: the columns that are."""
    missing = [name for name in names if name not in frame.columns]
    if missing:
        have = ", ".join(frame.columns[:12]) + (", ..." if len(frame.columns) > 12 else "")
        listed = ", ".join(repr(name) for name in missing)
        raise UserError(f"{source}: no column {listed} ({why}); the file has {have}")


def numbers(column: pl.Series, source: str) -> Tensor:
    """A column as float64, NaN where missing; UserError on text, and on values that float32 cannot hold."""
    parsed = _parse_numbers(column, source)
    stray = parsed.is_null() & column.is_not_null()
    if stray.any():
        row = int(stray.arg_max() or 0)
        raise UserError(
            f"{source}: column {column.name!r}, data row {row + 1}: {column[row]!r} is not a number; "
            "mend the cell, or name the text in data.missing_values or the column in data.categorical"
        )
    values = torch.from_numpy(parsed.fill_null(float("nan")).to_numpy(writable=True))
    too_large = values.abs() > FLOAT32_MAX
    if too_large.any():
        row = int(too_large.int().argmax())
        raise UserError(
            f"{source}: column {column.name!r}, data row {row + 1}: {column[row]} is infinite or beyond float32"
        )
    return values


def labels(column: pl.Series, source: str) -> pl.Series:
    """A column as text, null where missing; UserError on a type that is none (lists, bytes).

    One value reads the same from every kind of file, cell by cell: 1, 1.0 and the texts `1` and `1.0` are `1`; true
    is `true`, also when a program wrote it as True or TRUE.
    """
    if column.dtype.is_float():
        column = column.fill_nan(None)
    try:
        text = column.cast(pl.String)
    except PolarsError:
        raise UserError(
            f"{source}: column {column.name!r} has type {column.dtype}: turn it into text or numbers"
        ) from None
    text = text.replace({"True": "true", "TRUE": "true", "False": "false", "FALSE": "false", "-0.0": "0"})
    return text.str.replace(r"^(-?[0-9]+)\.0+$", "$1")


def _read_csv(file: Path, missing_values: Sequence[str]) -> pl.DataFrame:
    # Arrow is strict where it matters: a row with a cell too few or too many, or bytes that are not UTF-8, is an error.
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    # One thread: only then does Arrow name the row in which it stumbles.
    read = pyarrow.csv.ReadOptions(use_threads=False)
    with pyarrow.csv.open_csv(_csv_input(file), parse_options=parse, read_options=read) as head:
        names = head.schema.names
    _check_names(names, file)
    convert = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in names},
        null_values=list(missing_values),
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    table = pyarrow.csv.read_csv(_csv_input(file), parse_options=parse, convert_options=convert, read_options=read)
    return _as_frame(pl.from_arrow(table))


def _csv_input(file: Path) -> Path | BytesIO:
    """The file; with a newline at its end when it has none at all, or else Arrow takes a lone header for nothing."""
    with file.open("rb") as stream:
        head = stream.read(_MAX_HEADER_BYTES)
        short = not stream.read(1)
    return BytesIO(head + b"\n") if short and b"\n" not in head else file


def _read_parquet(file: Path, _missing_values: Sequence[str]) -> pl.DataFrame:
    # Arrow, because a damaged file makes it raise; polars may abort the process on the same bytes.
    with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as stream:
        _check_names(stream.schema_arrow.names, file)
        table = stream.read()
    table.validate(full=True)
    frame = _as_frame(pl.from_arrow(table.replace_schema_metadata(None)))
    for name, dtype in frame.schema.items():
        if isinstance(dtype, (pl.Categorical, pl.Enum, pl.Boolean)):
            # As the same column would read from a CSV file.
            frame = frame.with_columns(pl.col(name).cast(pl.String))
    return frame


def _as_frame(data: pl.DataFrame | pl.Series) -> pl.DataFrame:
    return data if isinstance(data, pl.DataFrame) else data.to_frame()


def _reason(error: BaseException) -> str:
    """First line of a library's message, without the control characters that a damaged file may bring into it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0])[:_MAX_REASON]


def _check_names(names: Sequence[str], file: Path) -> None:
    for index, name in enumerate(names):
        if not name.strip():
            raise UserError(f"{file}: column {index + 1} has no name")
        if name in names[:index]:
            raise UserError(f"{file}: two columns are named {name!r}")


def _is_numeric(column: pl.Series, source: str) -> bool:
    if column.dtype.is_numeric():
        return True
    if column.dtype == pl.Null:
        return True
    if column.dtype != pl.String:
        raise UserError(
            f"{source}: column {column.name!r} has type {column.dtype}: turn it into numbers or text, "
            "or name it in data.drop"
        )
    present = column.drop_nulls()
    if present.is_empty():
        return True
    num_numbers = present.str.strip_chars().cast(pl.Float64, strict=False).is_not_null().sum()
    if MOSTLY_NUMBERS <= num_numbers / len(present) < 1:
        numbers(column, source)  # raises, naming the stray cell
    return num_numbers == len(present)


def _parse_numbers(column: pl.Series, source: str) -> pl.Series:
    if column.dtype == pl.String:
        return column.str.strip_chars().cast(pl.Float64, strict=False)
    if not column.dtype.is_numeric() and column.dtype != pl.Null:
        raise UserError(f"{source}: column {column.name!r} has type {column.dtype}, numbers are expected")
    return column.cast(pl.Float64, strict=False)
