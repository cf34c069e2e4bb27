"""Patterns on the command line -> the files of a table, in order, and what is taken of them."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from dist_train.config.schema import DataConfig
from dist_train.data.files.readers import Part, read_header, read_index_names, read_parts
from dist_train.data.tables.columns import Columns, Unit
from dist_train.data.tables.table import BUILTIN, locate, require_names
from dist_train.errors import UserError

# Rows of a Parquet file that one rank reads in one go.
_ROWS_OF_A_UNIT = 1 << 20
# What pandas calls an index that has no name: in Parquet files, and in CSV files that were written and read again.
_INDEX_NAME = re.compile(r"__index_level_[0-9]+__|Unnamed: 0(\.[0-9]+)*")
PANDAS_INDEX = "an index of pandas"


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files of the patterns, those of each in the order of their names; UserError when one matches nothing."""
    files: list[Path] = []
    for pattern in patterns:
        if pattern.startswith(BUILTIN) or Path(pattern).exists():
            found = [_file(pattern)]
        else:
            found = [_file(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (absolute ones)
        if not found:
            raise UserError(f"{pattern}: no such file, and as a pattern it matches none (in {Path.cwd()})")
        files += found
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{file}: is given twice: its rows would count twice")
        seen.add(file.resolve())
    return files


def plan_columns(files: Sequence[Path], data: DataConfig) -> Columns:
    """What is taken of each row; UserError names a file that has other columns than the first one."""
    first = read_header(files[0])
    columns = columns_of(first, data, str(files[0]), read_index_names(files[0]))
    known = {*first, *data.drop}
    for file in files[1:]:
        names = read_header(file)
        require_names(names, columns.names, str(file), f"{files[0]} has it")
        index = read_index_names(file)
        strange = [name for name in names if name not in known and not _is_index(name, index)]
        if strange:
            raise UserError(
                f"{file}: column {strange[0]!r} is not in {files[0]}: name it in data.drop, or mend the file"
            )
    return columns


def columns_of(header: Sequence[str], data: DataConfig, source: str, index_names: Sequence[str] = ()) -> Columns:
    """What is taken of each row of a file with such columns; UserError when one that is named is not there.

    The index of a pandas frame, by its name or because the file says so, is left out unless the configuration names it.
    """
    of_rows = (data.split_column, data.weight, data.time_column, data.group_column)
    no_features = [name for name in of_rows if name is not None]
    named = [data.target, *data.drop, *data.categorical, *data.formats, *no_features]
    require_names(header, named, source, "named in the configuration")
    others, index = {data.target, *no_features, *data.drop}, frozenset(index_names)
    left_out = {name: PANDAS_INDEX for name in header if _is_index(name, index) and name not in named}
    features = [name for name in header if name not in others and name not in left_out]
    if not features:
        rest = ", ".join(sorted({*others, *left_out}))
        raise UserError(f"{source}: no feature columns are left besides {rest}")
    return Columns(
        features,
        data.target,
        data.split_column,
        data.categorical,
        data.missing_values,
        data.weight,
        data.time_column,
        data.group_column,
        left_out=left_out,
        formats=data.formats,
    )


def _is_index(name: str, index_names: Collection[str]) -> bool:
    return name in index_names or _INDEX_NAME.fullmatch(name) is not None


def plan_units(files: Sequence[Path]) -> list[Unit]:
    """What is read in one go, in the order of the table."""
    units: list[Unit] = []
    for file in files:
        found = file.stat()
        for part in read_parts(file, _ROWS_OF_A_UNIT):
            units.append(Unit(len(units), file, found.st_size, found.st_mtime_ns, part))
    return units


def whole_file(file: Path, shown_as: str) -> Unit:
    """A file to be read in one go."""
    found = file.stat()
    return Unit(0, file, found.st_size, found.st_mtime_ns, Part(), shown_as)


def _file(path: str) -> Path:
    if Path(path).is_dir():
        raise UserError(f"{path}: is a directory: name its files, as in '{path.rstrip('/')}/*.parquet'")
    return locate(path)
