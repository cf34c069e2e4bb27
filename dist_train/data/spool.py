"""The rows of a table, read and checked once: typed columns in batches, which the passes of a fit and an encoding read.

The batches are held in memory, or in Arrow files that are mapped to memory. Numbers of CSV files are parsed here and
nowhere else, and here alone a column is found to hold numbers or categories. A file that changes later does no harm:
nobody reads it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from dist_train.data.batches import Batches
from dist_train.data.classes import MAX_CLASSES, check_whole, first_rows, ordered_names, target_text
from dist_train.data.readers import Part, read_rows
from dist_train.data.split import codes_of_column
from dist_train.data.table import (
    ColumnKinds,
    as_text,
    float32_range,
    no_number,
    numbers_with_stray_text,
    parse_numbers,
    require_columns,
    require_numbers_or_text,
)
from dist_train.data.weights import weights_of_column
from dist_train.errors import UserError
from dist_train.system.files import TMP_PREFIX, write_atomically

_TARGET, _SPLIT, _WEIGHT, _FEATURE = "target", "split", "weight", "feature:"
# Types whose numbers float32 holds exactly.
_SMALL = (pl.Float32, pl.Int8, pl.Int16, pl.UInt8, pl.UInt16)


@dataclass(frozen=True)
class Columns:
    """What is taken of each row; `features` in the order of the first file."""

    features: list[str]
    target: str
    split_column: str | None
    categorical: list[str]
    missing_values: list[str]
    weight: str | None = None


@dataclass(frozen=True)
class Unit:
    """What one rank reads in one go: a file, or a part of one. `number` counts them in the order of the table.

    `shown_as` is how messages name the file, where not by its path.
    """

    number: int
    file: Path
    size: int
    modified_ns: int
    part: Part
    shown_as: str | None = None

    @property
    def source(self) -> str:
        """What messages call it."""
        return self.shown_as or str(self.file)

    def check_unchanged(self) -> None:
        """UserError when the file is no longer the one that was found first."""
        try:
            now = self.file.stat()
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read any more: {error.strerror}") from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise UserError(f"{self.file}: the file has changed since the preparation began")


@dataclass
class ColumnFacts:
    """What a column holds in a unit: cells that are there, those that are numbers, the first other one and its row."""

    text: bool
    present: int = 0
    numbers: int = 0
    stray: tuple[int, str] | None = None


@dataclass
class UnitFacts:
    """What is known of a unit once it was read: `batches` their rows; `classes` count and first row of each text."""

    batches: list[int] = field(default_factory=list)
    columns: dict[str, ColumnFacts] = field(default_factory=dict)
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)


class _TurnsOutText(Exception):
    """A column that looked like numbers holds text further down."""


def read_facts(folder: Path, unit: Unit) -> UnitFacts | None:
    """What is known of a unit that was read into `folder`; None when it was not, or its file is another one by now."""
    try:
        content = json.loads(_facts_file(folder, unit).read_bytes())
    except (OSError, ValueError):
        return None
    if content["unit"] != _identity(unit):
        return None
    columns = {name: ColumnFacts(**facts) for name, facts in content["columns"].items()}
    return UnitFacts(content["batches"], columns, {text: tuple(v) for text, v in content["classes"].items()})


def _facts_file(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.number:06d}.json"


def rows_file(folder: Path, unit: Unit) -> Path:
    """Where `spool_unit` puts the rows of a unit."""
    return folder / f"{unit.number:06d}.arrow"


def _identity(unit: Unit) -> dict[str, Any]:
    """As JSON gives it back."""
    identity: dict[str, Any] = json.loads(json.dumps(asdict(unit), default=str))
    return identity


def spool_unit(unit: Unit, columns: Columns, folder: Path, as_text: frozenset[str]) -> Iterator[int]:
    """Read a unit into `folder`; yields the rows of each step. Columns in `as_text` are kept as text in any case.

    UserError names the file, and the column and the row of a bad cell.
    """
    text = set(as_text) | set(columns.categorical)
    aside = folder / f"{TMP_PREFIX}{unit.number:06d}.arrow"
    while True:
        spooling = _Spooling(unit, columns, text)
        try:
            with aside.open("wb") as stream:
                yield from _write_batches(spooling.run(), stream)
                stream.flush()
                os.fsync(stream.fileno())
        except _TurnsOutText:
            continue  # from the start: `text` has grown
        break
    unit.check_unchanged()
    aside.replace(rows_file(folder, unit))
    write_atomically(_facts_file(folder, unit), json.dumps(asdict(spooling.facts) | {"unit": _identity(unit)}).encode())


def read_in_memory(unit: Unit, columns: Columns) -> tuple[UnitFacts, list[pa.RecordBatch]]:
    """Read a unit; categories are dictionaries, which take the least memory.

    Raises:
        UserError: a cell cannot be read; file, column and row are named.
    """
    text = set(columns.categorical)
    while True:
        spooling = _Spooling(unit, columns, text)
        try:
            batches = [_with_dictionaries(batch) for _, batch in spooling.run() if batch is not None]
        except _TurnsOutText:
            continue  # from the start: `text` has grown
        return spooling.facts, batches


def _write_batches(batches: Iterator[tuple[int, pa.RecordBatch | None]], stream: Any) -> Iterator[int]:
    writer = None
    for num_rows, batch in batches:
        if batch is not None:
            writer = writer or pa.ipc.new_file(stream, batch.schema)
            writer.write_batch(batch)
        yield num_rows
    if writer:
        writer.close()


def _with_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = {
        name: column.dictionary_encode() if pa.types.is_large_string(column.type) else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    return pa.record_batch(columns)


class _Spooling:
    """One go through a unit."""

    def __init__(self, unit: Unit, columns: Columns, text: set[str]) -> None:
        self.facts = UnitFacts()
        self._unit = unit
        self._source = unit.source
        self._columns = columns
        self._text = text
        self._codes: dict[str, int] = {}

    def run(self) -> Iterator[tuple[int, pa.RecordBatch | None]]:
        """Rows that were read, and the batch of them; None for no rows."""
        row = self._unit.part.first_row
        for frame in read_rows(self._unit.file, self._columns.missing_values, self._unit.part):
            wanted = [*self._columns.features, self._columns.target]
            wanted += filter(None, [self._columns.split_column, self._columns.weight])
            require_columns(frame, wanted, self._source, "the first file has it, or the configuration names it")
            batch = self._batch(frame, row) if frame.height else None
            if frame.height:
                self.facts.batches.append(frame.height)
            row += frame.height
            yield frame.height, batch

    def _batch(self, frame: pl.DataFrame, row: int) -> pa.RecordBatch:
        arrays: dict[str, pa.Array] = {_TARGET: pa.array(self._target(frame[self._columns.target], row))}
        if self._columns.split_column:
            codes = codes_of_column(frame[self._columns.split_column], self._source, row)
            arrays[_SPLIT] = pa.array(codes.numpy())
        if self._columns.weight:
            arrays[_WEIGHT] = pa.array(weights_of_column(frame[self._columns.weight], self._source, row).numpy())
        known = len(self._text)
        features = {name: self._feature(frame[name], row) for name in self._columns.features}
        if len(self._text) > known and self.facts.batches:
            raise _TurnsOutText
        return pa.record_batch(arrays | {f"{_FEATURE}{name}": values for name, values in features.items()})

    def _target(self, column: pl.Series, row: int) -> np.ndarray[Any, Any]:
        text = target_text(column, self._source, row)
        for name, first in first_rows(text).items():
            self._codes.setdefault(name, len(self._codes))
            self.facts.classes.setdefault(name, (0, row + first))
        for name, count in text.value_counts().iter_rows():
            known, first = self.facts.classes[name]
            self.facts.classes[name] = known + count, first
        if len(self._codes) > MAX_CLASSES:
            check_classes([(self._unit, self.facts)], self._columns.target)
        return text.replace_strict(self._codes, return_dtype=pl.Int32).to_numpy()

    def _feature(self, column: pl.Series, row: int) -> pa.Array:
        name = column.name
        facts = self.facts.columns.setdefault(name, ColumnFacts(name in self._text))
        if name in self._columns.categorical:
            return _texts(column, self._source)
        require_numbers_or_text(column, self._source)
        parsed = parse_numbers(column)
        present, found = len(column) - column.null_count(), len(parsed) - parsed.null_count()
        if found < present:
            self._text.add(name)
            facts.text = True
            if facts.stray is None:
                stray = int((parsed.is_null() & column.is_not_null()).arg_max() or 0)
                facts.stray = row + stray, str(column[stray])
        facts.present += present
        facts.numbers += found
        if name in self._text:
            return _texts(column, self._source)
        values = float32_range(parsed, column, self._source, row).numpy()
        return pa.array(values.astype(np.float32) if column.dtype in _SMALL else values)


def _texts(column: pl.Series, source: str) -> pa.Array:
    return as_text(column, source).to_arrow().cast(pa.large_string())


def class_places(found: Sequence[tuple[Unit, UnitFacts]], target: str) -> dict[str, tuple[str, int]]:
    """Source and row of each class's first cell; UserError when the target is a quantity."""
    places: dict[str, tuple[str, int]] = {}
    for unit, facts in found:
        for text, (_, row) in facts.classes.items():
            places.setdefault(text, (unit.source, row))
    check_whole(places, target)
    return places


def check_classes(found: Sequence[tuple[Unit, UnitFacts]], target: str) -> list[str]:
    """Class names of the table, in their order; UserError when the target is none."""
    places = class_places(found, target)
    return ordered_names(places, target, found[0][0].source if len(found) == 1 else "the table")


def kinds_of(found: Sequence[tuple[Unit, UnitFacts]], columns: Columns) -> ColumnKinds:
    """Numbers or categories, by all cells of each column; UserError names the first stray text among numbers."""
    numeric = []
    for name in columns.features:
        facts = [(unit, of_unit.columns[name]) for unit, of_unit in found if of_unit.batches]
        present, count = (sum(getattr(f, what) for _, f in facts) for what in ("present", "numbers"))
        if name in columns.categorical:
            continue
        if numbers_with_stray_text(count, present):
            unit, stray = next((unit, f.stray) for unit, f in facts if f.stray)
            raise no_number(name, unit.source, *stray)
        if count == present:
            numeric.append(name)
    return ColumnKinds(tuple(numeric), tuple(name for name in columns.features if name not in numeric))


def units_to_read_as_text(found: Sequence[tuple[Unit, UnitFacts]], kinds: ColumnKinds) -> list[int]:
    """Numbers of the units that keep a category as numbers: nothing in them told that it is one."""
    return [
        unit.number
        for unit, facts in found
        if any(not f.text and f.present for name, f in facts.columns.items() if name in kinds.categorical)
    ]


@dataclass(frozen=True)
class Chunk:
    """Rows that are worked on at a time: batch `batch` of a unit, from row `first_row` of the table on."""

    unit: int
    batch: int
    first_row: int
    num_rows: int


class Spool:
    """The table as it was read, on every rank; `weighted`: with a column of weights."""

    def __init__(
        self,
        batches: Batches,
        found: Sequence[tuple[Unit, UnitFacts]],
        kinds: ColumnKinds,
        class_names: Sequence[str],
        *,
        weighted: bool = False,
    ) -> None:
        self.kinds = kinds
        self.weighted = weighted
        self._batches = batches
        self._found = found
        self._class_index = {name: index for index, name in enumerate(class_names)}

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All rows in the order of the table."""
        chunks, row = [], 0
        for index, (_, facts) in enumerate(self._found):
            for batch, num_rows in enumerate(facts.batches):
                chunks.append(Chunk(index, batch, row, num_rows))
                row += num_rows
        return chunks

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return sum(sum(facts.batches) for _, facts in self._found)

    @property
    def classes(self) -> set[str]:
        """Names of the classes that occur."""
        return {name for _, facts in self._found for name in facts.classes}

    def source(self, chunk: Chunk) -> str:
        """The file that a chunk's rows come from."""
        return self._found[chunk.unit][0].source

    def targets(self, chunk: Chunk) -> Tensor:
        """Class indices, (rows,) int64."""
        names = self._found[chunk.unit][1].classes  # in the order of the unit's own codes
        indices = torch.tensor([self._class_index[name] for name in names])
        return indices[torch.from_numpy(self._column(chunk, _TARGET).to_numpy().astype(np.int64))]

    def split_codes(self, chunk: Chunk) -> Tensor:
        """Index in SPLITS as the split column says it, (rows,) uint8."""
        return torch.from_numpy(self._column(chunk, _SPLIT).to_numpy().copy())

    def weights(self, chunk: Chunk) -> Tensor:
        """Weights of the rows as the weight column says them, (rows,) float64."""
        return torch.from_numpy(self._column(chunk, _WEIGHT).to_numpy().copy())

    def frame(self, chunk: Chunk, names: Sequence[str]) -> pl.DataFrame:
        """Features by name: numbers as Float64 with NaN where missing, categories as text."""
        return pl.DataFrame([self._feature(chunk, name) for name in names])

    def _feature(self, chunk: Chunk, name: str) -> pl.Series:
        column = self._column(chunk, f"{_FEATURE}{name}")
        if name in self.kinds.numeric:
            return pl.Series(name, column.to_numpy().astype(np.float64))
        if pa.types.is_floating(column.type):  # without any value in this unit, or it would have been read as text
            return pl.Series(name, [None] * len(column), dtype=pl.String)
        return pl.Series(name, column.dictionary_decode() if pa.types.is_dictionary(column.type) else column)

    def _column(self, chunk: Chunk, name: str) -> pa.Array:
        return self._batches(chunk.unit, chunk.batch).column(name)
