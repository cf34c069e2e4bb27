"""CSV, JSON lines and Parquet files -> rows in parts.

Cells of CSV and JSON lines come as text (null where missing), Parquet columns in their own types. Whatever is wrong
with a file is one line that names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from math import isfinite
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from polars.exceptions import PanicException, PolarsError

from dist_train.data.files.arrow_types import frame_of_arrow
from dist_train.data.files.csv_files import COMPRESSIONS, CSV_SUFFIXES, LATIN_NAME, is_csv_name, opened_csv
from dist_train.data.files.json_lines import JSON_LINES_SUFFIXES, is_json_lines_name, json_lines_names, json_lines_rows
from dist_train.errors import Stopped, UserError

UNNAMED_INDEX = "Unnamed: 0"
"""Name of a first column of a CSV file that has none."""

_PARQUET_SUFFIXES = (".parquet", ".pq")
SUFFIXES = (
    *(kind + end for kind in (*CSV_SUFFIXES, *JSON_LINES_SUFFIXES) for end in ("", *COMPRESSIONS)),
    *_PARQUET_SUFFIXES,
)
"""What the name of a file ends in that can be read, in lower case."""

_MAX_REASON = 300
_CELLS_AT_ONCE = 1 << 21
_MIN_ROWS_AT_ONCE, _MAX_ROWS_AT_ONCE = 1 << 9, 1 << 16
# Of each column of a Parquet file that is being read; without it Arrow holds whole row groups.
_PARQUET_BUFFER_BYTES = 1 << 18


class Kind(StrEnum):
    """How a file is written, by its name."""

    CSV = "csv"
    JSON_LINES = "JSON lines"
    PARQUET = "parquet"


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
        names = _header_of(file)
    if _kind_of(file) is Kind.CSV and _are_cells(names):
        raise UserError(
            f"{file}: its first line holds numbers alone ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}): "
            "it seems to have no header: write the names of the columns into a line above"
        )
    _check_names(names, file)
    return names


def read_index_names(file: Path) -> list[str]:
    """Names of the columns that are the index of the pandas frame which a file was written from, as it says itself."""
    if _kind_of(file) is not Kind.PARQUET:
        return []
    with _mistakes(file):
        metadata = pyarrow.parquet.read_schema(file).pandas_metadata or {}
    return [name for name in metadata.get("index_columns", []) if isinstance(name, str)]


def num_rows_of(file: Path) -> int | None:
    """Rows of a Parquet file; None of a text file, which only reading it tells."""
    if _kind_of(file) is not Kind.PARQUET:
        return None
    with _mistakes(file):
        return int(pyarrow.parquet.read_metadata(file).num_rows)


def read_parts(file: Path, rows: int) -> list[Part]:
    """A Parquet file cut between row groups, into parts of `rows` rows or more; a text file as a whole."""
    if _kind_of(file) is not Kind.PARQUET:
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


def read_rows(
    file: Path, missing_values: Sequence[str], part: Part = Part(), columns: Collection[str] | None = None
) -> Iterator[pl.DataFrame]:
    """The rows in order, some of them at a time; at least one table, without rows when there are none.

    Only `columns` are read, as far as they are there; None: all of them.
    """
    wanted = None if columns is None else frozenset(columns)
    with _mistakes(file):
        match _kind_of(file):
            case Kind.CSV:
                yield from _csv_rows(file, missing_values, wanted)
            case Kind.JSON_LINES:
                names = json_lines_names(file)
                _check_names(names, file)
                yield from json_lines_rows(file, names, missing_values, wanted)
            case _:
                yield from _parquet_rows(file, part, wanted)


def _csv_rows(file: Path, missing_values: Sequence[str], columns: Collection[str] | None) -> Iterator[pl.DataFrame]:
    written = _written_names(file)
    names = _names_of(written)
    _check_names(names, file)
    wanted = {name: text for name, text in zip(names, written, strict=True) if columns is None or name in columns}
    convert = pyarrow.csv.ConvertOptions(
        include_columns=list(wanted.values()),
        column_types={text: pa.string() for text in wanted.values()},
        null_values=list(missing_values),
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    empty = True
    with opened_csv(file, convert) as stream:
        for batch in stream:
            yield frame_of_arrow(batch.rename_columns(list(wanted)), str(file))
            empty = False
    if empty:
        yield pl.DataFrame(schema=dict.fromkeys(wanted, pl.String))


def _written_names(file: Path) -> list[str]:
    """Names of the columns of a CSV file with the spaces that stand around them."""
    with opened_csv(file) as head:
        return list(head.schema.names)


def _names_of(written: Sequence[str]) -> list[str]:
    """Names without spaces around them; a first column without a name is what pandas and R write an index as."""
    names = [name.strip() for name in written]
    return [UNNAMED_INDEX, *names[1:]] if names[:1] == [""] and UNNAMED_INDEX not in names else names


def _parquet_rows(file: Path, part: Part, columns: Collection[str] | None) -> Iterator[pl.DataFrame]:
    # Arrow, because a damaged file makes it raise; polars may abort the process on the same bytes.
    with pyarrow.parquet.ParquetFile(
        file, page_checksum_verification=True, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES
    ) as stream:
        _check_names(stream.schema_arrow.names, file)
        names = [name for name in stream.schema_arrow.names if columns is None or name in columns]
        groups = range(*part.row_groups) if part.row_groups else range(stream.num_row_groups)
        rows = max(_MIN_ROWS_AT_ONCE, min(_MAX_ROWS_AT_ONCE, _CELLS_AT_ONCE // max(1, len(names))))
        empty = True
        for batch in stream.iter_batches(rows, row_groups=list(groups), columns=names):
            batch = batch.select(names)  # Arrow also reads `a.b` where `a` is asked for
            batch.validate(full=True)
            yield frame_of_arrow(batch, str(file))
            empty = False
        if empty:
            yield frame_of_arrow(stream.schema_arrow.empty_table().select(names), str(file))


def cells_are_text(file: Path) -> bool:
    """Whether a file has no types of its own; false for a name that no reader takes."""
    return is_csv_name(file) or is_json_lines_name(file)


def _kind_of(file: Path) -> Kind:
    if is_csv_name(file):
        return Kind.CSV
    if is_json_lines_name(file):
        return Kind.JSON_LINES
    if file.suffix.lower() in _PARQUET_SUFFIXES:
        return Kind.PARQUET
    raise UserError(
        f"{file}: the name must end in .csv, .tsv, .jsonl or .ndjson, also compressed (.gz, .zst, .bz2), or in .parquet"
    )


def _header_of(file: Path) -> list[str]:
    match _kind_of(file):
        case Kind.CSV:
            return _names_of(_written_names(file))
        case Kind.JSON_LINES:
            return json_lines_names(file)
        case _:
            return list(pyarrow.parquet.read_schema(file).names)


@contextmanager
def _mistakes(file: Path) -> Iterator[None]:
    kind = _kind_of(file)  # a wrong name says more than what is wrong with the content
    try:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty")
        yield
    except pa.ArrowCancelled:  # pyarrow ends its work when a signal comes that Python handles
        raise Stopped from None
    except (pa.ArrowException, PolarsError, PanicException, OSError, UnicodeDecodeError) as error:
        if "Empty CSV file" in str(error):
            raise UserError(f"{file}: the table has no rows") from None
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{file}: is neither UTF-8 nor {LATIN_NAME}: save it as UTF-8 ({error.reason})") from None
        raise UserError(f"{file}: cannot be read as {kind}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """First line of a library's message, without the control characters that a damaged file may bring into it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0])[:_MAX_REASON]


def _are_cells(names: Sequence[str]) -> bool:
    """Whether all names are numbers, and not such as programs number columns with: whole, rising or without gaps."""
    try:
        found = [float(name) for name in names]
    except ValueError:
        return False
    if not found or not all(map(isfinite, found)):
        return False
    rising = all(one < two for one, two in pairwise(found))
    without_gaps = sorted(found) == [min(found) + place for place in range(len(found))]
    return not (all(map(str.isdecimal, names)) and (rising or without_gaps))


def _check_names(names: Sequence[str], file: Path) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if not name.strip():
            raise UserError(f"{file}: column {index + 1} has no name")
        if name in seen:
            raise UserError(f"{file}: two columns are named {name!r}")
        seen.add(name)
