"""The columns of a table: which are read, what a part of the table holds, and the kinds found by all parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data.cells.readings import FormFacts, Reading, Seen, recognised
from dist_train.data.files.readers import Part
from dist_train.data.tables.classes import check_whole, ordered_names
from dist_train.data.tables.table import MOSTLY_NUMBERS, ColumnKinds, no_number, numbers_with_stray_text
from dist_train.errors import UserError

# In fewer rows a column counts them by chance.
_ROWS_THAT_TELL = 20

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Columns:
    """What is taken of each row; `features` in the order of the first file.

    Of a model: `numbers` are its columns of numbers, and `categories` the words for "missing" that are categories of
    its columns, by name. `left_out`: columns of the file that are not used, and why. `formats`: the form of the cells
    of a column, where it is known before they are read.
    """

    features: list[str]
    target: str
    split_column: str | None
    categorical: list[str]
    missing_values: list[str]
    weight: str | None = None
    time_column: str | None = None
    group_column: str | None = None
    numbers: list[str] = field(default_factory=list)
    categories: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        of_rows = (self.split_column, self.weight, self.time_column, self.group_column)
        return [*self.features, self.target, *(name for name in of_rows if name is not None)]


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
    """What a column holds in a unit: cells that are there, those that are numbers, the first other one and its row.

    `row_offset`: where each cell is the number of its row in the file plus a constant, that constant. `padded`: a cell
    of digits that begins with a zero, where there is one among the first rows. `forms`: the forms of cells that are no
    numbers. `form`: that by which they were read; `typed`: they are of a type of dates or durations.
    """

    text: bool
    present: int = 0
    numbers: int = 0
    stray: tuple[int, str] | None = None
    row_offset: int | None = None
    padded: str | None = None
    forms: FormFacts | None = None
    form: str | None = None
    typed: bool = False

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ColumnFacts:
        """From its fields."""
        return cls(**{**content, "forms": content["forms"] and FormFacts(**content["forms"])})


@dataclass
class UnitFacts:
    """What is known of a unit once it was read: `batches` their rows; `classes` count and first row of each text.

    `times`: what its time column holds, INTEGERS or TIMES, with the first row of each.
    """

    batches: list[int] = field(default_factory=list)
    columns: dict[str, ColumnFacts] = field(default_factory=dict)
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)


def row_offset(values: FloatArray, row: int) -> int | None:
    """What is added to the number of the row, from `row` on, in each cell; None where it is not the same in all."""
    first = values[0]
    if not (values[-1] - first == len(values) - 1 and first.is_integer()):
        return None
    return int(first) - row if (np.diff(values) == 1).all() else None


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
    """Numbers, or what becomes numbers by its form, or categories, by all cells of each column.

    UserError names the first stray text among numbers.
    """
    readings: list[Reading] = []
    remarks: list[str] = []
    numeric: list[str] = []
    categorical: list[str] = []
    left_out = dict(columns.left_out)
    named = frozenset(columns.categorical)
    for name in columns.features:
        if name in named:
            categorical.append(name)
            continue
        facts = [(unit, of_unit.columns[name]) for unit, of_unit in found if of_unit.batches]
        present, count = (sum(getattr(f, what) for _, f in facts) for what in ("present", "numbers"))
        if count < present:
            seen = [Seen(unit.source, f.present, f.numbers, f.stray and f.stray[1], f.forms) for unit, f in facts]
            reading, remark = recognised(name, seen, columns.formats.get(name), MOSTLY_NUMBERS)
            remarks += [f"column {name!r}: {remark}"] if remark else []
            if reading:
                readings.append(reading)
                numeric += reading.features
                continue
        if numbers_with_stray_text(count, present):
            unit, stray = next((unit, f.stray) for unit, f in facts if f.stray)
            raise no_number(name, unit.source, *stray)
        if count == present and _is_row_number(found, name):
            left_out[name] = "the number of the row"
        else:
            (numeric if count == present else categorical).append(name)
    if not numeric and not categorical:
        raise UserError(f"{found[0][0].source}: no feature columns are left besides {', '.join(left_out)}")
    if len(set(numeric)) < len(numeric):
        twice = next(name for name in numeric if numeric.count(name) > 1)
        raise UserError(f"{found[0][0].source}: column {twice!r} has the name of a part of a date: rename it")
    return ColumnKinds(tuple(numeric), tuple(categorical), tuple(left_out.items()), tuple(readings), tuple(remarks))


def _is_row_number(found: Sequence[tuple[Unit, UnitFacts]], name: str) -> bool:
    """Whether a column counts the rows from 0 or 1 on, through the table or in each file anew."""
    in_table: set[int | None] = set()
    in_file: set[int | None] = set()
    rows = 0
    for unit, facts in found:
        if facts.batches:
            offset = facts.columns[name].row_offset
            in_file.add(offset)
            in_table.add(None if offset is None else offset + unit.part.first_row - rows)
            rows += sum(facts.batches)
    return rows >= _ROWS_THAT_TELL and any(offsets in ({0}, {1}) for offsets in (in_file, in_table))


def units_to_read_again(found: Sequence[tuple[Unit, UnitFacts]], kinds: ColumnKinds) -> list[int]:
    """Numbers of the units that keep a category as numbers, or what has a form as text: nothing in them told it."""
    forms = {reading.column: reading.form for reading in kinds.readings}
    categorical = frozenset(kinds.categorical)

    def is_wrong(name: str, facts: ColumnFacts) -> bool:
        if name in forms:
            return bool(facts.present) and not facts.typed and facts.form != forms[name]
        return name in categorical and not facts.text and bool(facts.present)

    return [unit.number for unit, facts in found if any(is_wrong(name, f) for name, f in facts.columns.items())]
