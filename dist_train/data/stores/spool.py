"""The rows of a table, read and checked once: typed columns in batches, which the passes of a fit and an encoding read.

The batches are held in memory, or in Arrow files that are mapped to memory. Numbers of CSV files are parsed here and
nowhere else, and here alone a column is found to hold numbers or categories. A file that changes later does no harm:
nobody reads it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from dist_train.data.cells.dates import typed_seconds
from dist_train.data.cells.missing import without_missing_words, words_with_value
from dist_train.data.cells.readings import FormFacts, Reading, parse
from dist_train.data.files.readers import cells_are_text, read_rows
from dist_train.data.splits.split import codes_of_column
from dist_train.data.stores.batches import Batches
from dist_train.data.tables.classes import MAX_CLASSES, first_rows, index_of_classes, target_text
from dist_train.data.tables.columns import ColumnFacts, Columns, FloatArray, Unit, UnitFacts, check_classes, row_offset
from dist_train.data.tables.row_keys import group_keys, time_keys
from dist_train.data.tables.table import (
    ColumnKinds,
    arrow_text,
    as_text,
    float32_range,
    parse_known_numbers,
    parse_numbers,
    require_columns,
    require_numbers_or_text,
)
from dist_train.data.tables.weights import weights_of_column
from dist_train.errors import UserError
from dist_train.system.files import TMP_PREFIX, write_atomically

_TARGET, _SPLIT, _WEIGHT, _TIME, _GROUP, _FEATURE = "target", "split", "weight", "time", "group", "feature:"
# Types whose numbers float32 holds exactly.
_SMALL = (pl.Float16, pl.Float32, pl.Int8, pl.Int16, pl.UInt8, pl.UInt16)
# A number of digits that begins with a zero: a postcode, an account, a code.
_PADDED = "^0[0-9]+$"


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
    columns = {name: ColumnFacts.from_json(facts) for name, facts in content["columns"].items()}
    classes = {text: tuple(v) for text, v in content["classes"].items()}
    return UnitFacts(content["batches"], columns, classes, content["times"])


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
        # The letters of a word are null in a text file already, other spellings of its value are not.
        self._missing_words = (words_with_value if cells_are_text(unit.file) else list)(columns.missing_values)
        self._categorical = frozenset(columns.categorical)
        self._known_numbers = frozenset(columns.numbers)
        self._text = text
        self._codes: dict[str, int] = {}

    def run(self) -> Iterator[tuple[int, pa.RecordBatch | None]]:
        """Rows that were read, and the batch of them; None for no rows."""
        row = self._unit.part.first_row
        columns = self._columns
        for frame in read_rows(self._unit.file, columns.missing_values, self._unit.part, columns.names):
            require_columns(frame, columns.names, self._source, "the first file has it, or the configuration names it")
            batch = self._batch(frame, row) if frame.height else None
            if frame.height:
                self.facts.batches.append(frame.height)
            row += frame.height
            yield frame.height, batch

    def _batch(self, frame: pl.DataFrame, row: int) -> pa.RecordBatch:
        arrays: dict[str, pa.Array] = {_TARGET: _array(self._target(frame[self._columns.target], row))}
        if self._columns.split_column:
            codes = codes_of_column(frame[self._columns.split_column], self._source, row)
            arrays[_SPLIT] = _array(codes.numpy())
        if self._columns.weight:
            arrays[_WEIGHT] = _array(weights_of_column(frame[self._columns.weight], self._source, row).numpy())
        if self._columns.time_column:
            times, kind = time_keys(frame[self._columns.time_column], self._source, row)
            self.facts.times.setdefault(kind, row)
            arrays[_TIME] = _array(times.numpy())
        if self._columns.group_column:
            arrays[_GROUP] = _array(group_keys(frame[self._columns.group_column], self._source, row).numpy())
        known = len(self._text)
        features = {name: self._feature(frame[name], row) for name in self._columns.features}
        if len(self._text) > known and self.facts.batches:
            raise _TurnsOutText
        return pa.record_batch(arrays | {f"{_FEATURE}{name}": values for name, values in features.items()})

    def _target(self, column: pl.Series, row: int) -> np.ndarray[Any, Any]:
        text = target_text(self._with_nulls(column), self._source, row)
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
        column = self._with_nulls(column)
        if name in self._categorical:
            return _texts(column, self._source)
        known, is_temporal = name in self._known_numbers, column.dtype.is_temporal()
        if name in self._columns.formats or (is_temporal and not known and name not in self._text):
            return self._by_form(column, facts, row)
        if not known:
            require_numbers_or_text(column, self._source)
        parsed = parse_known_numbers(column, self._source) if known else parse_numbers(column)
        present, found = len(column) - column.null_count(), len(parsed) - parsed.null_count()
        if (column.dtype == pl.Boolean or is_temporal) and not known:
            found = 0  # true and false are categories, and so are dates among text
        if found < present:
            self._text.add(name)
            facts.text = True
            if facts.stray is None and column.dtype != pl.Boolean:
                stray = int((parsed.is_null() & column.is_not_null()).arg_max() or 0)
                facts.stray = row + stray, str(column[stray])
        facts.present += present
        facts.numbers += found
        if name in self._text:
            if column.dtype == pl.String or is_temporal:
                facts.forms = facts.forms or FormFacts()
                facts.forms.see(column, row)
            return _texts(column, self._source)
        values = float32_range(parsed, column, self._source, row).numpy()
        self._look_at_numbers(facts, column, values, row)
        return _array(values.astype(np.float32) if column.dtype in _SMALL else values)

    def _by_form(self, column: pl.Series, facts: ColumnFacts, row: int) -> pa.Array:
        facts.form = self._columns.formats.get(column.name)
        facts.typed = column.dtype.is_temporal()
        present = len(column) - column.null_count()
        facts.present += present
        values = typed_seconds(column) if facts.form is None else parse(column, facts.form, self._source, row)
        if column.dtype.is_numeric():
            facts.numbers += present
        elif present:
            facts.forms = facts.forms or FormFacts()
            facts.forms.see(column, row)
        return _array(float32_range(values, column, self._source, row).numpy())

    def _look_at_numbers(self, facts: ColumnFacts, column: pl.Series, values: FloatArray, row: int) -> None:
        begins = not self.facts.batches
        offset = row_offset(values, row) if begins or facts.row_offset is not None else None
        facts.row_offset = offset if begins or offset == facts.row_offset else None
        if begins and column.dtype == pl.String:
            padded = column.filter(column.str.contains(_PADDED))
            facts.padded = padded[0] if len(padded) else None

    def _with_nulls(self, column: pl.Series) -> pl.Series:
        return without_missing_words(column, self._missing_words, self._columns.categories.get(column.name, ()))


def _array(values: np.ndarray[Any, Any]) -> pa.Array:
    # Not pa.array(), which imports pandas: that takes a second.
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _texts(column: pl.Series, source: str) -> pa.Array:
    return arrow_text(as_text(column, source))


def with_numbers(batches: Iterable[pa.RecordBatch], kinds: ColumnKinds, source: str) -> Iterator[pa.RecordBatch]:
    """Batches of `read_in_memory` with numbers in the columns that become numbers by their form."""
    row = 0
    for batch in batches:
        for reading in kinds.readings:
            index = batch.schema.get_field_index(f"{_FEATURE}{reading.column}")
            column = batch.column(index)
            if pa.types.is_dictionary(column.type):
                texts = pl.Series(reading.column, column.dictionary_decode())
                values = float32_range(parse(texts, reading.form, source, row), texts, source, row).numpy()
                batch = batch.set_column(index, batch.schema.field(index).name, _array(values))
        row += batch.num_rows
        yield batch


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
        self._numeric = frozenset(kinds.numeric)
        self._batches = batches
        self._found = found
        self._class_index = index_of_classes(class_names, self.classes)

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
    def padded(self) -> dict[str, str]:
        """Columns of numbers that hold digits after a zero, as postcodes do: such a cell by name of the column."""
        cells = {n: f.padded for _, facts in self._found for n, f in facts.columns.items() if f.padded is not None}
        return {name: cells[name] for name in self.kinds.numeric if name in cells}

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

    @cached_property
    def has_split_column(self) -> bool:
        """Whether a column says the split; kept, since batches in memory are released one by one."""
        return any(_SPLIT in self._batches(c.unit, c.batch).schema.names for c in self.chunks[:1])

    def times(self, chunk: Chunk) -> Tensor:
        """Numbers in the order of the times of the rows, (rows,) int64."""
        return torch.from_numpy(self._column(chunk, _TIME).to_numpy().copy())

    def groups(self, chunk: Chunk) -> Tensor:
        """A number for the group of each row, (rows,) int64."""
        return torch.from_numpy(self._column(chunk, _GROUP).to_numpy().copy())

    def check_times(self, name: str, source: str) -> None:
        """UserError when the time column holds dates in some rows and whole numbers in others."""
        places: dict[str, str] = {}
        for unit, facts in self._found:
            for kind, row in facts.times.items():
                places.setdefault(kind, f"{kind} in {unit.source}, data row {row + 1}")
        if len(places) > 1:
            raise UserError(f"{source}: column {name!r} has no one order: {' and '.join(places.values())}")

    def frame(self, chunk: Chunk, names: Sequence[str], readings: Sequence[Reading]) -> pl.DataFrame:
        """Features by name: numbers as Float64 with NaN where missing, categories as text."""
        made = {feature: reading for reading in readings for feature in reading.features}
        return pl.DataFrame([self._made(chunk, made[n], n) if n in made else self._feature(chunk, n) for n in names])

    def numbers(self, chunk: Chunk, columns: Sequence[str]) -> pl.DataFrame:
        """The numbers of columns that have a form, Float64 with NaN where missing: of dates their seconds."""
        return pl.DataFrame([pl.Series(n, self._column(chunk, f"{_FEATURE}{n}").to_numpy()) for n in columns])

    def _made(self, chunk: Chunk, reading: Reading, name: str) -> pl.Series:
        return reading.feature(self.numbers(chunk, [reading.column]).to_series(), name)

    def _feature(self, chunk: Chunk, name: str) -> pl.Series:
        column = self._column(chunk, f"{_FEATURE}{name}")
        if name in self._numeric:
            return pl.Series(name, column.to_numpy().astype(np.float64))
        if pa.types.is_floating(column.type):  # without any value in this unit, or it would have been read as text
            return pl.Series(name, [None] * len(column), dtype=pl.String)
        return pl.Series(name, column.dictionary_decode() if pa.types.is_dictionary(column.type) else column)

    def _column(self, chunk: Chunk, name: str) -> pa.Array:
        return self._batches(chunk.unit, chunk.batch).column(name)
