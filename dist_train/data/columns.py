"""The columns of a table: which are read, what a part of the table holds, and the kinds found by all parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_train.data.classes import check_whole, ordered_names
from dist_train.data.readers import Part
from dist_train.data.table import ColumnKinds, no_number, numbers_with_stray_text
from dist_train.errors import UserError


@dataclass(frozen=True)
class Columns:
    """What is taken of each row; `features` in the order of the first file."""

    features: list[str]
    target: str
    split_column: str | None
    categorical: list[str]
    missing_values: list[str]
    weight: str | None = None
    time_column: str | None = None
    group_column: str | None = None

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
    """What a column holds in a unit: cells that are there, those that are numbers, the first other one and its row."""

    text: bool
    present: int = 0
    numbers: int = 0
    stray: tuple[int, str] | None = None


@dataclass
class UnitFacts:
    """What is known of a unit once it was read: `batches` their rows; `classes` count and first row of each text.

    `times`: what its time column holds, INTEGERS or TIMES, with the first row of each.
    """

    batches: list[int] = field(default_factory=list)
    columns: dict[str, ColumnFacts] = field(default_factory=dict)
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)


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
