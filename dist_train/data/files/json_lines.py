"""Files of JSON lines: one object a line, its values as the cells of a CSV file.

A string is its text, a number the digits as they stand in the file, true and false are those words; null, an empty
text that means missing and a key that a line has not are missing cells.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from dist_train.data.files.csv_files import ends_in, opened_bytes
from dist_train.errors import UserError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
_CELLS_AT_ONCE = 1 << 18

Numbered = tuple[int, dict[str, Any]]
"""Number of a line, from 1 on, and its object."""


def is_json_lines_name(file: Path) -> bool:
    """Whether a file is JSON lines by its name, which may end in .gz, .zst or .bz2 as well."""
    return ends_in(file, JSON_LINES_SUFFIXES)


def json_lines_names(file: Path) -> list[str]:
    """Keys of the first line: the names of the columns.

    Raises:
        UserError: there is no line, or it holds no object.
    """
    first = next(_objects(file), None)
    if first is None:
        raise UserError(f"{file}: the table has no rows")
    if not first[1]:
        raise UserError(f"{file}: line {first[0]} has no keys")
    return list(first[1])


def json_lines_rows(
    file: Path, names: Sequence[str], missing_values: Collection[str], columns: Collection[str] | None
) -> Iterator[pl.DataFrame]:
    """The rows in order as text, some of them at a time; of the columns `names` those of `columns`, None: all of them.

    Raises:
        UserError: a line holds no object, a key that the first line has not, or a list or an object in a column that
            is read.
    """
    wanted = [name for name in names if columns is None or name in columns]
    known, missing = frozenset(names), frozenset(missing_values)
    objects = _objects(file)
    while part := list(islice(objects, max(1, _CELLS_AT_ONCE // len(names)))):
        for number, record in part:
            if not record.keys() <= known:
                key = next(key for key in record if key not in known)
                raise UserError(f"{file}: line {number} has {key!r}, which line 1 has not: add it there as null")
        cells = {name: [_cell(file, n, name, record.get(name), missing) for n, record in part] for name in wanted}
        yield pl.DataFrame(cells, schema=dict.fromkeys(wanted, pl.String))


def _objects(file: Path) -> Iterator[Numbered]:
    """The lines that are not empty."""
    decode = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str, object_pairs_hook=_object).decode
    with opened_bytes(file) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if not line.strip():
                continue
            try:
                record = decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\ud" in line.lower():
                    json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"{file}: line {number} is no JSON: half of a pair of UTF-16 in it") from None
            except UnicodeDecodeError:
                raise UserError(f"{file}: line {number} is not UTF-8") from None
            except (ValueError, RecursionError) as error:
                reason = "too deep" if isinstance(error, RecursionError) else str(error)
                raise UserError(f"{file}: line {number} is no JSON: {reason}") from None
            if not isinstance(record, dict):
                raise UserError(f'{file}: line {number} holds no object, such as {{"income": 5200, "purpose": "car"}}')
            yield number, record


def _lines(stream: Any) -> Iterator[bytes]:
    """The lines of a stream of bytes, without their line breaks."""
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key stands twice in it")
    return record


def _cell(file: Path, number: int, name: str, value: Any, missing: Collection[str]) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return None if value in missing else value
    kind = "a list" if isinstance(value, list) else "an object"
    raise UserError(
        f"{file}: line {number} has {kind} in column {name!r}: give each value a column, or drop the column"
    )
