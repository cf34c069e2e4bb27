"""Dates, timestamps and durations -> seconds, and the parts of a date that a model gets.

Seconds of dates are since 1970-01-01 UTC; a timestamp without a time zone is taken for UTC.
"""

from __future__ import annotations

import math

import polars as pl

SECONDS_OF_A_DAY = 86_400.0

_MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December"]  # fmt: skip
_NUMBER_OF_MONTH = {
    spelling: str(number)
    for number, month in enumerate(_MONTHS, 1)
    for name in (month, *(["Sept"] if month == "September" else []), month[:3])
    for spelling in (name, name.lower(), name.upper())
}
# Both cases are listed: a pattern that ignores the case is many times as slow.
_MONTH = "(?P<month>" + "|".join(_NUMBER_OF_MONTH) + r")\.?"
_TIME = (
    r"(?:(?:[T ]|, ?)(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2}(?:[.,][0-9]{1,9})?))?"
    r"(?: ?(?P<half>[AaPp])\.?[Mm]\.?)?(?: ?(?P<zone>Z|UTC|GMT|[+-][0-9]{2}:?(?:[0-9]{2})?))?)?$"
)
_YEAR, _DAY = r"(?P<year>(?:[0-9]{2})?[0-9]{2})", "(?P<day>[0-9]{1,2})"
_NUMERIC_MONTH = "(?P<month>[0-9]{1,2})"
# Year first, and months in words: no order of day and month is in doubt.
_CERTAIN = [
    r"^(?P<year>[0-9]{4})[-/.](?P<month>[0-9]{1,2})[-/.](?P<day>[0-9]{1,2})" + _TIME,
    r"^(?P<year>(?:19|20)[0-9]{2})-(?P<month>[0-9]{2})" + _TIME,
    rf"^(?:{_DAY}[-/ ])?{_MONTH}[-/ ]{_YEAR}" + _TIME,
    rf"^{_MONTH} {_DAY},? {_YEAR}" + _TIME,
]
_PATTERNS = {
    "date": _CERTAIN,
    "day/month/year": [*_CERTAIN, rf"^{_DAY}[-/.]{_NUMERIC_MONTH}[-/.]{_YEAR}" + _TIME],
    "month/day/year": [*_CERTAIN, rf"^{_NUMERIC_MONTH}[-/]{_DAY}[-/]{_YEAR}" + _TIME],
}
DATE_FORMS = tuple(_PATTERNS)
"""Forms of dates: year first or the month in words; and these or numbers with the day or the month first."""

# What every date begins with: quick to tell from other text.
_BEGINNING = "^(?:[0-9]{1,4}[-/. ](?:[0-9]{1,2}|[A-Za-z]{3,9})\\b|(?:" + "|".join(_NUMBER_OF_MONTH) + r")\.?[-/ ][0-9])"
_DURATION = r"^(-?)([0-9]{1,6}):([0-5][0-9])(?::([0-5][0-9](?:[.,][0-9]{1,9})?))?$"


def parse_dates(texts: pl.Series, form: str) -> pl.Series:
    """Seconds since 1970-01-01 UTC, Float64, null where a text is no date of the form. A month alone is its first day.

    Texts have no spaces around them. Years of two digits are those from 1969 to 2068, as POSIX reads them.
    """
    found = pl.Series(texts.name, [None] * len(texts), dtype=pl.Float64)
    may_be = texts.str.contains(_BEGINNING).fill_null(False)
    for pattern in _PATTERNS[form]:
        if not may_be.any():
            break
        fits = may_be & texts.str.contains(pattern).fill_null(False)
        if fits.any():
            found = found.scatter(fits.arg_true(), _seconds(texts.filter(fits), pattern))
            may_be &= ~fits
    return found


def parse_durations(texts: pl.Series) -> pl.Series:
    """Seconds of texts such as 1:30 (hours and minutes) and 01:30:00, Float64, null where a text is none."""
    parts = texts.str.extract_groups(_DURATION).struct.unnest()
    sign, hours, minutes, seconds = (pl.col(name) for name in parts.columns)
    value = hours.cast(pl.Float64) * 3600 + minutes.cast(pl.Float64) * 60
    value = value + seconds.fill_null("0").str.replace(",", ".", literal=True).cast(pl.Float64)
    return parts.select(pl.when(sign == "-").then(-value).otherwise(value)).to_series().rename(texts.name)


def typed_seconds(column: pl.Series) -> pl.Series:
    """A column of type Date, Datetime, Duration or Time in seconds, Float64, null where missing."""
    if column.dtype == pl.Date:
        return column.cast(pl.Int32).cast(pl.Float64) * SECONDS_OF_A_DAY
    if column.dtype == pl.Time:
        return column.cast(pl.Int64).cast(pl.Float64) / 1e9
    unit = {"ms": 1e3, "us": 1e6, "ns": 1e9}[column.dtype.time_unit]  # type: ignore[attr-defined]
    return column.cast(pl.Int64).cast(pl.Float64) / unit


def finest_part(seconds: pl.Series) -> int:
    """0 where all dates are the first of a month at midnight, 1 where they are days, 2 where one has a time of day."""
    if (seconds % SECONDS_OF_A_DAY != 0).any():
        return 2
    return int((_calendar(seconds).dt.day() != 1).any())


PARTS = (("days", "year", "month sine", "month cosine"), ("day of month", "weekday sine", "weekday cosine"),
         ("hour sine", "hour cosine"))  # fmt: skip
"""What a date becomes, and what is added where dates are days, and where they have a time of day."""


def date_part(seconds: pl.Series, part: str, reference: float) -> pl.Series:
    """One of `PARTS` of each date, Float64, null where it is missing; `days` counts them from the reference on."""
    if part == "days":
        return (seconds - reference) / SECONDS_OF_A_DAY
    calendar = _calendar(seconds)
    match part.split(" "):
        case ["year"]:
            return calendar.dt.year().cast(pl.Float64)
        case ["day", *_]:
            return calendar.dt.day().cast(pl.Float64)
        case ["month", function]:
            turns = calendar.dt.month().cast(pl.Float64) / 12
        case ["weekday", function]:
            turns = calendar.dt.weekday().cast(pl.Float64) / 7
        case [_, function]:
            turns = seconds % SECONDS_OF_A_DAY / SECONDS_OF_A_DAY
    return (turns * (2 * math.pi)).sin() if function == "sine" else (turns * (2 * math.pi)).cos()


def _calendar(seconds: pl.Series) -> pl.Series:
    return (seconds * 1e6).round().cast(pl.Int64, strict=False).cast(pl.Datetime("us"))


def _seconds(texts: pl.Series, pattern: str) -> pl.Series:
    """Of texts that match the pattern; null where the day is none of the calendar, or the time none of the clock."""
    parts = texts.str.extract_groups(pattern).struct.unnest()
    if "day" not in parts.columns:
        parts = parts.with_columns(day=pl.lit("1"))
    short = pl.col("year").str.len_chars() == 2
    century = pl.when(pl.col("year").cast(pl.Int32) < 69).then(pl.lit("20")).otherwise(pl.lit("19"))
    month = pl.col("month").replace(_NUMBER_OF_MONTH)
    date = pl.concat_str(
        [pl.when(short).then(century + pl.col("year")).otherwise("year"), month, pl.col("day").fill_null("1")],
        separator="-",
    ).str.strptime(pl.Date, "%Y-%m-%d", strict=False)
    hour, minute = (pl.col(name).fill_null("0").cast(pl.Float64) for name in ("hour", "minute"))
    second = pl.col("second").fill_null("0").str.replace(",", ".", literal=True).cast(pl.Float64)
    half = pl.col("half").str.to_lowercase()
    of_day = pl.when(half.is_null()).then(hour).otherwise(hour % 12 + pl.when(half == "p").then(12.0).otherwise(0.0))
    clock = (
        (pl.when(half.is_null()).then(hour < 25).otherwise((hour > 0) & (hour < 13))) & (minute < 60) & (second < 61)
    )
    zone = pl.col("zone").str.extract_groups("^([+-])([0-9]{2}):?([0-9]{2})?$")
    east = zone.struct.field("2").cast(pl.Float64) * 3600 + zone.struct.field("3").fill_null("0").cast(pl.Float64) * 60
    offset = pl.when(zone.struct.field("1") == "-").then(-east).otherwise(east).fill_null(0.0)
    seconds = date.cast(pl.Int32).cast(pl.Float64) * SECONDS_OF_A_DAY + of_day * 3600 + minute * 60 + second - offset
    return parts.select(pl.when(clock).then(seconds)).to_series()
