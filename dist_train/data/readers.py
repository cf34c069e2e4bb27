"""CSV and Parquet files -> rows in parts.

Cells of CSV come as text (null where missing), Parquet columns in their own types. Whatever is wrong with a file is one
line that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from polars.exceptions import PanicException, PolarsError

from dist_train.errors import Stopped, UserError

_MAX_HEADER_BYTES = 1 << 20
_MAX_REASON = 300
_CSV_BLOCK_BYTES = 1 << 22
_CELLS_AT_ONCE = 1 << 21
_MAX_ROWS_AT_ONCE = 1 << 16
# Of each column of a Parquet file that is being read; without it Arrow holds whole row groups.
_PARQUET_BUFFER_BYTES = 1 << 18

# Arrow is strict where it matters: a row with a cell too few or too many, or bytes that are not UTF-8, is an error.
_PARSE = pyarrow.csv.ParseOptions(newlines_in_values=True)
# One thread: only then does Arrow name the row in which it stumbles.
_READ = pyarrow.csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES)


@dataclass(frozen=True)
class Part:
    """What can be read of a file on its own: a run of a Parquet file's row groups, from row `first_row` of the file on.

    None: all of it.
    """

    row_groups: tuple[int, int] | None = None
    first_row: int = 0


def read_header(file: Path) -> list[str]:
    """Names of the columns."""
    with _mistakes(file):
        if _is_csv(file):
            with pyarrow.csv.open_csv(_csv_input(file), parse_options=_PARSE, read_options=_READ) as head:
                names = list(head.schema.names)
        else:
            names = list(pyarrow.parquet.read_schema(file).names)
    _check_names(names, file)
    return names


def read_parts(file: Path, rows: int) -> list[Part]:
    """A Parquet file cut between row groups, into parts of `rows` rows or more; a CSV file as a whole."""
    if _is_csv(file):
        return [Part()]
    with _mistakes(file):
        metadata = pyarrow.parquet.read_metadata(file)
        lengths = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    parts, begin, first_row, row = [], 0, 0, 0
    for index, length in enumerate(lengths, 1):
        row += length
        if row - first_row >= rows or index == len(lengths):
            parts.append(Part((begin, index), first_row))
            begin, first_row = index, row
    return parts


def read_rows(file: Path, missing_values: Sequence[str], part: Part = Part()) -> Iterator[pl.DataFrame]:
    """The rows in order, some of them at a time; at least one table, without rows when there are none."""
    with _mistakes(file):
        yield from _csv_rows(file, missing_values) if _is_csv(file) else _parquet_rows(file, part)


def _csv_rows(file: Path, missing_values: Sequence[str]) -> Iterator[pl.DataFrame]:
    names = read_header(file)
    convert = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in names},
        null_values=list(missing_values),
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    empty = True
    with pyarrow.csv.open_csv(
        _csv_input(file), parse_options=_PARSE, convert_options=convert, read_options=_READ
    ) as stream:
        for batch in stream:
            yield _as_frame(batch)
            empty = False
    if empty:
        yield pl.DataFrame(schema=dict.fromkeys(names, pl.String))


def _csv_input(file: Path) -> Path | BytesIO:
    """The file; with a newline at its end when it has none at all, or else Arrow takes a lone header for nothing."""
    with file.open("rb") as stream:
        head = stream.read(_MAX_HEADER_BYTES)
        short = not stream.read(1)
    return BytesIO(head + b"\n") if short and b"\n" not in head else file


def _parquet_rows(file: Path, part: Part) -> Iterator[pl.DataFrame]:
    # Arrow, because a damaged file makes it raise; polars may abort the process on the same bytes.
    with pyarrow.parquet.ParquetFile(
        file, page_checksum_verification=True, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES
    ) as stream:
        names = stream.schema_arrow.names
        _check_names(names, file)
        groups = range(*part.row_groups) if part.row_groups else range(stream.num_row_groups)
        rows = max(1, min(_MAX_ROWS_AT_ONCE, _CELLS_AT_ONCE // max(1, len(names))))
        empty = True
        for batch in stream.iter_batches(rows, row_groups=list(groups)):
            batch.validate(full=True)
            yield _parquet_frame(batch)
            empty = False
        if empty:
            yield _parquet_frame(stream.schema_arrow.empty_table())


def _parquet_frame(batch: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    frame = _as_frame(batch.replace_schema_metadata(None))
    for name, dtype in frame.schema.items():
        if isinstance(dtype, (pl.Categorical, pl.Enum, pl.Boolean)):
            # As the same column would read from a CSV file.
            frame = frame.with_columns(pl.col(name).cast(pl.String))
    return frame


def _as_frame(batch: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    data = pl.from_arrow(batch)
    return data if isinstance(data, pl.DataFrame) else data.to_frame()


def _is_csv(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix not in (".csv", ".parquet", ".pq"):
        raise UserError(f"{file}: the name must end in .csv or .parquet")
    return suffix == ".csv"


@contextmanager
def _mistakes(file: Path) -> Iterator[None]:
    _is_csv(file)  # a wrong name says more than what is wrong with the content
    try:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty")
        yield
    except pa.ArrowCancelled:  # pyarrow ends its work when a signal comes that Python handles
        raise Stopped from None
    except (pa.ArrowException, PolarsError, PanicException, OSError, UnicodeDecodeError) as error:
        if "Empty CSV file" in str(error):
            raise UserError(f"{file}: the table has no rows") from None
        raise UserError(f"{file}: cannot be read as {file.suffix[1:].lower()}: {_reason(error)}") from None


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
