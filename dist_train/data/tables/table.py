"""CSV, JSON lines and Parquet files -> typed columns.

Whatever is wrong with a file is one line that names file, column and row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import polars as pl
import pyarrow as pa
import torch
from polars.exceptions import PolarsError
from torch import Tensor

from dist_train.data.cells.readings import Reading
from dist_train.data.files.readers import read_header, read_rows
from dist_train.errors import UserError

BUILTIN = "builtin:"
TRAINED_ON = "the model was trained on it"
FLOAT32_MAX = torch.finfo(torch.float32).max

# A text column in which at least this share of the cells are numbers is a column of numbers with stray text in it.
MOSTLY_NUMBERS = 0.5


_TRUTH = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class ColumnKinds:
    """Names of the features by kind, in the order of the table; `left_out`: columns that are not used, and why.

    `readings`: columns that become numbers by a form; a date is several features. `remarks`: what to say of columns.
    """

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    readings: tuple[Reading, ...] = ()
    remarks: tuple[str, ...] = ()


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
        raise UserError(f"{path}: is a directory, not a CSV, JSON lines or Parquet file")
    return file


def read_table(file: Path, missing_values: Sequence[str], columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read a file whole, or only the columns that are wanted of it, by a trained model.

    CSV cells come as text (null where missing), Parquet columns in their own types.

    Raises:
        UserError: the file cannot be read, or a wanted column is not there.
    """
    if columns is not None:
        require_names(read_header(file), columns, str(file), TRAINED_ON)
    return pl.concat(read_rows(file, missing_values, columns=columns))


def require_columns(frame: pl.DataFrame, names: Sequence[str], source: str, why: str) -> None:
    """UserError when a column is not there, with the nearest hint there is: the columns that are."""
    require_names(frame.columns, names, source, why)


def require_names(columns: Sequence[str], names: Sequence[str], source: str, why: str) -> None:
    """The same, by the names of the columns."""
    present = frozenset(columns)
    missing = [name for name in names if name not in present]
    if missing:
        have = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
        listed = ", ".join(repr(name) for name in missing)
        raise UserError(f"{source}: no column {listed} ({why}); the file has {have}")


def numbers(column: pl.Series, source: str, first_row: int = 0) -> Tensor:
    """A column as float64, NaN where missing; UserError on text, and on values that float32 cannot hold.

    The column begins with row `first_row` of the source.
    """
    parsed = parse_known_numbers(column, source)
    if parsed.null_count() > column.null_count():
        stray = parsed.is_null() & column.is_not_null()
        row = int(stray.arg_max() or 0)
        raise no_number(column.name, source, first_row + row, column[row])
    return float32_range(parsed, column, source, first_row)


def float32_range(parsed: pl.Series, column: pl.Series, source: str, first_row: int) -> Tensor:
    """The `parsed` numbers of a column as float64, NaN where missing; UserError on those that float32 cannot hold."""
    # What polars computes by way of an expression costs as much for a few rows as for thousands.
    parsed = parsed.fill_null(float("nan")) if parsed.null_count() else parsed
    values = torch.from_numpy(parsed.to_numpy(writable=True))
    too_large = values.abs() > FLOAT32_MAX
    if too_large.any():
        row = int(too_large.int().argmax())
        raise UserError(
            f"{source}: column {column.name!r}, data row {first_row + row + 1}: {column[row]} is infinite or beyond "
            f"float32; mend the cell, name {column[row]} in data.missing_values or the column in data.drop"
        )
    return values


def no_number(name: str, source: str, row: int, cell: object) -> UserError:
    """The mistake of a cell that should be a number."""
    return UserError(
        f"{source}: column {name!r}, data row {row + 1}: {cell!r} is not a number; "
        "mend the cell, or name the text in data.missing_values or the column in data.categorical"
    )


def as_text(column: pl.Series, source: str) -> pl.Series:
    """A column as text, as `words_of` gives it."""
    return pl.Series(column.name, words_of(column, source), dtype=pl.String)


def words_of(column: pl.Series, source: str) -> list[str | None]:
    """The cells of a column as text, None where missing; UserError on a type that is none (lists, bytes).

    One value reads the same from every kind of file, cell by cell: 1, 1.0 and the texts `1` and `1.0` are `1`; true
    is `true`, also when a program wrote it as True or TRUE.
    """
    try:
        text = (column.fill_nan(None) if column.dtype.is_float() else column).cast(pl.String)
    except PolarsError:
        raise UserError(
            f"{source}: column {column.name!r} has type {column.dtype}: turn it into text or numbers"
        ) from None
    words: list[str | None] = text.to_list()
    if column.dtype == pl.Boolean or column.dtype.is_integer():
        return words
    # Python: thousands of columns of some hundred cells take as long as a library's calls take to start.
    meant = {word: word if word is None else _meant(word) for word in set(words)}
    return [meant[word] for word in words]


def _meant(word: str) -> str:
    word = _SPELLINGS.get(word, word)
    whole = _WHOLE_NUMBER.fullmatch(word)
    return whole[1] if whole else word


def arrow_text(texts: pl.Series) -> pa.Array:
    """Text for Arrow's functions, which cost less for a few rows than those of polars."""
    return texts.alias("").to_arrow().cast(pa.large_string())  # Arrow takes no null character in a name


_SPELLINGS = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false", "-0.0": "0"}
_WHOLE_NUMBER = re.compile(r"(-?[0-9]+)\.0+")


def require_numbers_or_text(column: pl.Series, source: str) -> None:
    """UserError when a feature's cells are neither numbers nor text."""
    known = column.dtype.is_numeric() or column.dtype.is_temporal()
    if not known and column.dtype not in (pl.Null, pl.String, pl.Boolean):
        raise UserError(
            f"{source}: column {column.name!r} has type {column.dtype}: turn it into numbers or text, "
            "or name it in data.drop"
        )


def numbers_with_stray_text(num_numbers: int, num_present: int) -> bool:
    """Whether a text column with so many numbers among its cells is one of numbers with some stray text in it."""
    return num_numbers < num_present and num_numbers / num_present >= MOSTLY_NUMBERS


def parse_numbers(column: pl.Series) -> pl.Series:
    """A column of text or numbers as Float64, null where a cell is missing or no number."""
    parsed = column.cast(pl.Float64, strict=False)
    if column.dtype == pl.String and parsed.null_count() > column.null_count():
        parsed = column.str.strip_chars().cast(pl.Float64, strict=False)
    return parsed


def parse_known_numbers(column: pl.Series, source: str) -> pl.Series:
    """A column that a model knows as numbers, as `parse_numbers`; booleans, also as text, are 1 and 0.

    Raises:
        UserError: the column holds neither numbers nor text.
    """
    if not column.dtype.is_numeric() and column.dtype not in (pl.String, pl.Null, pl.Boolean):
        raise UserError(f"{source}: column {column.name!r} has type {column.dtype}, numbers are expected")
    parsed = parse_numbers(column)
    if column.dtype == pl.String and parsed.null_count() > column.null_count():
        words = column.str.strip_chars().str.to_lowercase()
        parsed = parsed.fill_null(words.replace_strict(_TRUTH, default=None, return_dtype=pl.Float64))
    return parsed
