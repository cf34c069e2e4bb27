"""How the cells of a column become numbers where they are amounts, dates or durations: recognised, saved, read again.

A column is of a form when all cells that are there are of it. Where several forms fit, the first of `COLUMN_FORMS` is
taken, except that dates whose day and month could be exchanged are refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from dist_train.config.schema import COLUMN_FORMS
from dist_train.data.cells.amounts import fits_amount, parse_amounts, plain_spelling, units_of
from dist_train.data.cells.dates import (
    DATE_FORMS,
    PARTS,
    date_part,
    finest_part,
    parse_dates,
    parse_durations,
    typed_seconds,
)
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError

AMOUNTS = {"1,234.56": ".", "1.234,56": ","}
DURATION = "hours:minutes:seconds"
PERCENT = "%"
_NO_DATE_ORDER = DATE_FORMS[1:]
_MAX_UNITS = 5


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A column whose cells are texts of numbers, or dates. `parts`: what a date becomes, counted from `reference` on.

    The reference is the latest date of the training rows, in seconds since 1970-01-01 UTC.
    """

    column: str
    form: str
    parts: tuple[str, ...] = ()
    reference: float | None = None

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the numeric columns that it becomes."""
        return tuple(f"{self.column}: {part}" for part in self.parts) if self.parts else (self.column,)

    def feature(self, values: pl.Series, name: str) -> pl.Series:
        """One of the features, Float64 with NaN where missing, from what `parse` gave of the column."""
        if self.parts:
            part = self.parts[self.features.index(name)]
            values = date_part(values.fill_nan(None), part, self.reference or 0.0)
        return values.fill_null(float("nan")).rename(name)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Reading:
        """From its fields."""
        return cls(**{**content, "parts": tuple(content["parts"])})

    def __str__(self) -> str:
        if self.parts:
            return f"dates ({self.form}): {', '.join(self.parts)}"
        return f"durations in seconds ({self.form})" if self.form == DURATION else f"amounts such as {self.form}"


@dataclass
class FormFacts:
    """How many cells of a column are of each form, the first that is not, and how fine its dates are.

    `units`: how often each currency or percent sign stands in an amount. `unclear`: an amount that is another number
    by the other form.
    """

    fits: dict[str, int] = field(default_factory=dict)
    stray: dict[str, tuple[int, str]] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    finest: dict[str, int] = field(default_factory=dict)
    unclear: str | None = None

    def see(self, column: pl.Series, row: int) -> None:
        """Cells of the column from row `row` of the source on: texts, dates or durations."""
        if column.dtype.is_temporal():
            self._see_typed(column)
            return
        counts = column.rename("text").drop_nulls().value_counts(name="count", sort=False)
        texts = counts["text"]
        if not len(texts):
            return
        plain = plain_spelling(texts)
        certain = parse_dates(plain, DATE_FORMS[0])
        for form in COLUMN_FORMS:
            fits = self._fits(plain, form, certain)
            if not fits.any():
                continue
            self.fits[form] = self.fits.get(form, 0) + int(counts["count"].filter(fits).sum())
            if form not in self.stray and not fits.all():
                odd = int(column.is_in(texts.filter(~fits).implode()).fill_null(False).arg_max() or 0)
                self.stray[form] = row + odd, column[odd]
        self._see_units(plain, counts["count"])

    def _fits(self, plain: pl.Series, form: str, certain: pl.Series) -> pl.Series:
        if form in AMOUNTS:
            return fits_amount(plain, AMOUNTS[form])
        if form == DURATION:
            return parse_durations(plain).is_not_null()
        seconds = certain
        if form != DATE_FORMS[0]:
            rest = certain.is_null()
            seconds = (
                certain.clone().scatter(rest.arg_true(), parse_dates(plain.filter(rest), form))
                if rest.any()
                else certain
            )
        if seconds.null_count() < len(seconds):
            self.finest[form] = max(self.finest.get(form, 0), finest_part(seconds.drop_nulls()))
        return seconds.is_not_null()

    def _see_units(self, plain: pl.Series, counts: pl.Series) -> None:
        one, other = (fits_amount(plain, mark) for mark in AMOUNTS.values())
        amounts = one | other
        if not amounts.any():
            return
        found = pl.DataFrame({"unit": units_of(plain.filter(amounts)), "count": counts.filter(amounts)})
        for unit, count in found.group_by("unit").sum().sort("unit").iter_rows():
            if unit in self.units or len(self.units) < _MAX_UNITS:
                self.units[unit] = self.units.get(unit, 0) + count
        if self.unclear is None:
            self.unclear = plain.filter(one & other & plain.str.contains("[.,]")).min()  # type: ignore[assignment]

    def _see_typed(self, column: pl.Series) -> None:
        seconds = typed_seconds(column).drop_nulls()
        is_date = column.dtype in (pl.Date, pl.Datetime)
        for form in DATE_FORMS if is_date else (DURATION,):
            self.fits[form] = self.fits.get(form, 0) + len(seconds)
            if is_date and len(seconds):
                self.finest[form] = max(self.finest.get(form, 0), finest_part(seconds))


@dataclass(frozen=True)
class Seen:
    """A column in one unit: cells that are there, plain numbers among them, the first other one.

    `forms`: what forms the cells are of; None where all are numbers.
    """

    source: str
    present: int
    numbers: int
    example: str | None
    forms: FormFacts | None


def recognised(name: str, seen: Sequence[Seen], given: str | None, mostly: float) -> tuple[Reading | None, str | None]:
    """The reading of a column by all of its cells and what to say of it; None for other text, of which it may say why.

    `given` is its form in `data.formats`.

    Raises:
        UserError: at least the share `mostly` of the cells is of a form, and a cell is not; or day and month of the
            dates could be exchanged.
    """
    present = sum(of_unit.present for of_unit in seen)
    fits: Counter[str] = Counter()
    for of_unit in seen:
        fits.update(of_unit.forms.fits if of_unit.forms else dict.fromkeys(AMOUNTS, of_unit.numbers))
    wanted = given.partition(" ")[0] if given else None
    complete = [form for form in COLUMN_FORMS if present and fits[form] == present and wanted in (None, form)]
    if not complete:
        best = max(COLUMN_FORMS, key=lambda form: fits[form])
        numbers = sum(of_unit.numbers for of_unit in seen)
        if present and fits[best] > numbers and fits[best] / present >= mostly:
            _refuse_stray(name, best, seen)
        return None, None
    form = complete[0]
    if form in AMOUNTS:
        return _amount(name, form, complete, seen, present)
    if form == DURATION:
        return _with_example(Reading(column=name, form=form), seen)
    if complete == list(_NO_DATE_ORDER):
        raise UserError(
            f"{seen[0].source}: column {name!r} holds dates such as {_example(seen)!r}, and no day is above 12: "
            f"say which is the month: data.formats={{{name}: {_NO_DATE_ORDER[0]}}} or {{{name}: {_NO_DATE_ORDER[1]}}}"
        )
    finest = max(of_unit.forms.finest.get(form, 0) for of_unit in seen if of_unit.forms)
    parts = tuple(part for parts in PARTS[: finest + 1] for part in parts)
    return _with_example(Reading(column=name, form=form, parts=parts), seen)


def _amount(
    name: str, form: str, complete: Sequence[str], seen: Sequence[Seen], present: int
) -> tuple[Reading | None, str]:
    units: Counter[str] = Counter()
    for of_unit in seen:
        units.update(of_unit.forms.units if of_unit.forms else {"": of_unit.numbers})
    signs = [unit for unit in units if unit]
    if len(signs) > 1:
        return None, f"categories: amounts in several units ({', '.join(sorted(signs))}) are no numbers of one kind"
    if units[PERCENT] not in (0, present):
        return None, "categories: some cells have a percent sign and some have none"
    reading, said = _with_example(Reading(column=name, form=" ".join([form, *signs])), seen)
    unclear = next((s.forms.unclear for s in seen if s.forms and s.forms.unclear), None)
    other = next((f for f in complete if f != form), None)
    if unclear and other:
        said += f"; {unclear!r} by the other reading of its mark is another number: data.formats={{{name}: '{other}'}}"
    return reading, said


def _with_example(reading: Reading, seen: Sequence[Seen]) -> tuple[Reading, str]:
    example = _example(seen)
    return reading, f"{reading}" + (f", of cells such as {example!r}" if example else "")


def _example(seen: Sequence[Seen]) -> str | None:
    return next((of_unit.example for of_unit in seen if of_unit.example), None)


def _refuse_stray(name: str, form: str, seen: Sequence[Seen]) -> None:
    for of_unit in seen:
        if of_unit.forms and form in of_unit.forms.stray:
            row, cell = of_unit.forms.stray[form]
            raise no_such_form(name, of_unit.source, row, cell, form)


def no_such_form(name: str, source: str, row: int, cell: object, form: str) -> UserError:
    """The mistake of a cell that is not of the form that the column has."""
    return UserError(
        f"{source}: column {name!r}, data row {row + 1}: {cell!r} is not of the form that the column has ({form}); "
        "mend the cell, or name the text in data.missing_values or the column in data.categorical"
    )


def parse(column: pl.Series, form: str, source: str, first_row: int = 0) -> pl.Series:
    """A column by its form, Float64, null where missing: numbers, or seconds (of dates since 1970-01-01 UTC).

    Raises:
        UserError: a cell is not of the form; the column begins with row `first_row` of the source.
    """
    values = _parsed(column, *form.partition(" ")[::2])
    stray = values.is_null() & column.is_not_null()
    if stray.any():
        row = int(stray.arg_max() or 0)
        raise no_such_form(column.name, source, first_row + row, column[row], form)
    return values


def _parsed(column: pl.Series, form: str, unit: str) -> pl.Series:
    nothing = pl.Series(column.name, [None] * len(column), dtype=pl.Float64)
    if column.dtype.is_temporal():
        is_date = column.dtype in (pl.Date, pl.Datetime)
        return typed_seconds(column) if (form in DATE_FORMS if is_date else form == DURATION) else nothing
    if column.dtype.is_numeric() or column.dtype == pl.Null:
        values = column.cast(pl.Float64)
        return values.fill_nan(None) if form in AMOUNTS or values.null_count() == len(values) else nothing
    if column.dtype != pl.String:
        return nothing
    texts = plain_spelling(column)
    if form == DURATION:
        return parse_durations(texts)
    if form in DATE_FORMS:
        return parse_dates(texts, form)
    values, found = parse_amounts(texts, AMOUNTS[form]), units_of(texts)
    allowed = found == unit if unit == PERCENT else (found != PERCENT if not unit else found.is_in(["", unit]))
    return values.set(~allowed, None)


def with_features(frame: pl.DataFrame, readings: Sequence[Reading], source: str, first_row: int = 0) -> pl.DataFrame:
    """A table as it was written, with the features of its dates and amounts in place of those columns.

    Raises:
        UserError: a cell is not of the form of its column.
    """
    features = []
    for reading in readings:
        values = parse(frame[reading.column], reading.form, source, first_row)
        features += [reading.feature(values, name) for name in reading.features]
    return frame.drop([reading.column for reading in readings]).with_columns(features) if features else frame


def with_latest_dates(
    readings: Sequence[Reading],
    seconds: Callable[[Sequence[str]], Iterator[pl.DataFrame]],
    collectives: Collectives,
) -> tuple[Reading, ...]:
    """The readings, those of dates with the latest date of the training rows.

    `seconds` gives this rank's training rows of some columns in parts.
    """
    latest = {reading.column: -math.inf for reading in readings if reading.parts}
    if not latest:
        return tuple(readings)

    def look() -> Iterator[int]:
        for frame in seconds(list(latest)):
            for column in latest:
                latest[column] = max([latest[column], *frame[column].fill_nan(None).drop_nulls().top_k(1)])
            yield frame.height

    collectives.lockstep(look())
    of_ranks = collectives.all_gather_object(lambda: latest)
    everywhere = {column: max(of_rank[column] for of_rank in of_ranks) for column in latest}
    found = {column: value for column, value in everywhere.items() if value > -math.inf}
    return tuple(replace(r, reference=found[r.column]) if r.column in found else r for r in readings)
