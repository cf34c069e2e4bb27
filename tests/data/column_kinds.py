"""Kinds of cells and columns, and what each becomes: the table of docs/columns.md, each row of it a test.

`python -m tests.data.column_kinds docs/columns.md` writes the table into the page.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl

from dist_train.config.schema import DataConfig
from dist_train.data.dataset import read_labelled
from dist_train.errors import UserError

BEGIN, END = "<!-- kinds: begin -->", "<!-- kinds: end -->"


@dataclass(frozen=True)
class Kind:
    """Some cells of a column, texts of a CSV file or typed ones of a Parquet file, and what it becomes."""

    name: str
    cells: list[Any]
    becomes: str
    dtype: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def row(self) -> str:
        """Of the table in the documentation."""
        shown = ", ".join(f"`{_plain(cell)}`" if cell is not None else "(missing)" for cell in self.cells[:3])
        keys = "".join(f" with `data.{key}`" for key in self.settings)
        where = "" if self.dtype is None else "Parquet: "
        return "| " + " | ".join([f"{self.name}{keys}", where + shown, self.becomes]).replace("\n", " ") + " |"


def _plain(cell: Any) -> str:
    return str(cell).replace("|", "\\|").replace("\u00a0", " ").replace("\u202f", " ")


MONTHS = "days, year, month sine, month cosine"
DAYS = MONTHS + ", day of month, weekday sine, weekday cosine"
HOURS = DAYS + ", hour sine, hour cosine"
DMY_OR_MDY = {"formats": {"x": "month/day/year"}}

KINDS = [
    # numbers
    Kind("whole numbers", ["3", "-12", "700"], "number: 3, -12, 700"),
    Kind("fractions", ["0.5", ".25", "3."], "number: 0.5, 0.25, 3"),
    Kind("scientific notation", ["1e3", "2.5E-3", "-1e+2"], "number: 1000, 0.0025, -100"),
    Kind("numbers with a plus sign", ["+3", "-4"], "number: 3, -4"),
    Kind("numbers with spaces around", [" 3", "4 "], "number: 3, 4"),
    Kind("numbers and missing cells", ["3", "NA", ""], "number: 3, missing, missing"),
    Kind("numbers and words for missing", ["3", "-", "?"], "number: 3, missing, missing",
         settings={"missing_values": ["-", "?"]}),
    Kind("no cell at all", ["", "NA"], "number: missing, missing"),
    Kind("a number that means missing", ["3", "-999", "-999.0"], "number: 3, missing, missing",
         settings={"missing_values": ["-999"]}),
    Kind("a typed number that means missing", [3.5, -999.0, 2.0], "number: 3.5, missing, 2",
         settings={"missing_values": ["-999"]}, dtype=pl.Float64),
    Kind("a typed date that means missing", [date(2020, 3, 1), date(1900, 1, 1), date(2021, 3, 1)],
         f"date (date): {MONTHS}", settings={"missing_values": ["1900-01-01"]}, dtype=pl.Date),
    Kind("infinite, named as missing", [3.5, float("inf"), 2.0], "number: 3.5, missing, 2",
         settings={"missing_values": ["inf"]}, dtype=pl.Float64),
    Kind("infinite", ["1", "inf"], "refused: column 'x', data row 2: inf is infinite or beyond float32; "
         "mend the cell, name inf in data.missing_values or the column in data.drop"),
    Kind("beyond float32", ["1", "1e39"], "refused: column 'x', data row 2: 1e39 is infinite or beyond float32; "
         "mend the cell, name 1e39 in data.missing_values or the column in data.drop"),
    Kind("a word among numbers", ["1", "2", "about 3"],
         "refused: column 'x', data row 3: 'about 3' is not a number; mend the cell, or name the text in "
         "data.missing_values or the column in data.categorical"),
    # amounts
    Kind("thousands separated by commas", ["50,172", "930", "1,204,000"],
         "number (1,234.56): 50172, 930, 1204000"),
    Kind("thousands and a fraction", ["12,098.79", "5.5"], "number (1,234.56): 12098.79, 5.5"),
    Kind("thousands in groups of India", ["12,34,567.00", "5"], "number (1,234.56): 1234567, 5"),
    Kind("thousands separated by spaces", ["12 098.79", "5"], "number (1,234.56): 12098.79, 5"),
    Kind("thousands separated by no-break spaces, decimal comma", ["12\u00a0098,79", "1\u202f234,5"],
         "number (1.234,56): 12098.79, 1234.5"),
    Kind("thousands separated by apostrophes", ["12'098.79", "1\u2019234.50"], "number (1,234.56): 12098.79, 1234.5"),
    Kind("decimal commas", ["1,5", "12,25"], "number (1.234,56): 1.5, 12.25"),
    Kind("decimal commas and points between thousands", ["1.234,56", "7"], "number (1.234,56): 1234.56, 7"),
    Kind("a point or a comma before three digits, in every cell", ["1,234", "2,500"],
         "number (1,234.56): 1234, 2500"),
    Kind("the same, with its form", ["1,234", "2,500"], "number (1.234,56): 1.234, 2.5",
         settings={"formats": {"x": "1.234,56"}}),
    Kind("decimal commas with an exponent", ["1,5E+03", "2,5"], "number (1.234,56): 1500, 2.5"),
    Kind("a currency sign", ["$12,098.79", "$5", "-$3"], "number (1,234.56 $): 12098.79, 5, -3"),
    Kind("a currency sign behind", ["1.234,56 €", "5 €"], "number (1.234,56 €): 1234.56, 5"),
    Kind("a currency code", ["USD 1,200.50", "USD 3"], "number (1,234.56 USD): 1200.5, 3"),
    Kind("several currencies", ["$5", "€7"], "category: $5, €7"),
    Kind("percent cells", ["9.51%", "12 %"], "number (1,234.56 %): 9.51, 12"),
    Kind("percent cells and others", ["9.51%", "3%", "0.12"], "category: 0.12, 3%, 9.51%"),
    Kind("accounting negatives", ["(1,234.50)", "20.00"], "number (1,234.56): -1234.5, 20"),
    Kind("a minus behind", ["1,234.50-", "20.00"], "number (1,234.56): -1234.5, 20"),
    Kind("a minus of typographers", ["\u22125", "7"], "number (1,234.56): -5, 7"),
    Kind("a word among amounts", ["$5", "$6", "many"],
         "refused: column 'x', data row 3: 'many' is not of the form that the column has (1,234.56); mend the cell, "
         "or name the text in data.missing_values or the column in data.categorical"),
    # dates and durations
    Kind("dates, year first", ["2015-03-01", "2015-3-14", "2015/04/02"], f"date (date): {DAYS}"),
    Kind("months", ["Dec-2011", "Jan-2012", "2012-03"], f"date (date): {MONTHS}"),
    Kind("dates with the month in words", ["5 March 2014", "March 12, 2014", "07-Apr-14"], f"date (date): {DAYS}"),
    Kind("day first, by a day above 12", ["01/02/2015", "31/12/2015"], f"date (day/month/year): {DAYS}"),
    Kind("day first, by its points", ["01.02.2015", "03.04.2015"], f"date (day/month/year): {DAYS}"),
    Kind("month first, by a day above 12", ["01/02/2015", "12/31/15"], f"date (month/day/year): {DAYS}"),
    Kind("day and month that could be exchanged", ["01/02/2015", "03/04/2015"],
         "refused: column 'x' holds dates such as '01/02/2015', and no day is above 12: say which is the month: "
         "data.formats={x: day/month/year} or {x: month/day/year}"),
    Kind("the same, with its form", ["01/02/2015", "03/04/2015"], f"date (month/day/year): {DAYS}",
         settings=DMY_OR_MDY),
    Kind("two forms of dates", ["2015-03-01", "14/03/2015"], f"date (day/month/year): {DAYS}"),
    Kind("timestamps", ["2015-03-01 10:30:00", "2015-03-01T11:00:00.5"], f"date (date): {HOURS}"),
    Kind("timestamps with time zones", ["2015-03-01T10:30:00Z", "2015-03-01 11:00+02:00"], f"date (date): {HOURS}"),
    Kind("timestamps of twelve hours", ["12/31/2015 1:05 PM", "12/30/2015 11:00 AM"],
         f"date (month/day/year): {HOURS}"),
    Kind("dates and missing cells", ["2015-03-01", "NA"], f"date (date): {MONTHS}"),
    Kind("days that no calendar has", ["2015-02-30", "2015-02-31"], "category: 2015-02-30, 2015-02-31"),
    Kind("durations", ["1:30", "02:45:10"], "number (hours:minutes:seconds): 5400, 9910"),
    # texts
    Kind("words", ["car", "house", "car"], "category: car, house"),
    Kind("yes and no", ["yes", "no"], "category: no, yes"),
    Kind("true and false", ["True", "FALSE"], "category: false, true"),
    Kind("bands", ["1-3", "4-10", "10+"], "category: 1-3, 10+, 4-10"),
    Kind("a number and its unit", ["36 months", "60 months"], "category: 36 months, 60 months"),
    Kind("numbers that are codes", ["02413", "10115"], "category: 02413, 10115", settings={"categorical": ["x"]}),
    Kind("dates that are categories", ["2015-03-01", "2015-03-02"], "category: 2015-03-01, 2015-03-02",
         settings={"categorical": ["x"]}),
    # types of Parquet
    Kind("floats, NaN is missing", [1.5, float("nan"), None], "number: 1.5, missing, missing", pl.Float64),
    Kind("unsigned 64-bit integers", [2**64 - 1, 5], "number: 18446744073709551616, 5", pl.UInt64),
    Kind("decimals", [Decimal("1.50"), Decimal("-2.25")], "number: 1.5, -2.25", pl.Decimal(12, 2)),
    Kind("booleans", [True, False], "category: false, true", pl.Boolean),
    Kind("dictionaries of text", ["a", "b"], "category: a, b", pl.Categorical),
    Kind("a column without a type", [None, None], "number: missing, missing", pl.Null),
    Kind("typed dates", [date(2015, 3, 1), date(2015, 3, 2)], f"date (date): {DAYS}", pl.Date),
    Kind("typed timestamps", [datetime(2015, 3, 1, 10), None], f"date (date): {HOURS}", pl.Datetime("us")),
    Kind("typed timestamps with a time zone", [datetime(2015, 3, 1, 10, tzinfo=UTC), None], f"date (date): {HOURS}",
         pl.Datetime("us", "UTC")),
    Kind("typed durations", [timedelta(hours=1, minutes=30), None], "number (hours:minutes:seconds): 5400, missing",
         pl.Duration("us")),
    Kind("times of the day", [time(1, 30), None], "number (hours:minutes:seconds): 5400, missing", pl.Time),
    Kind("lists", [[1], [2, 3]],
         "refused: column 'x' has type List(Int64): turn it into numbers or text, or name it in data.drop",
         pl.List(pl.Int64)),
    Kind("bytes of UTF-8", [b"a", b"b"], "category: a, b", pl.Binary),
]  # fmt: skip


def what_becomes_of(kind: Kind, folder: Path) -> str:
    """As `Kind.becomes` says it."""
    column = pl.Series("x", kind.cells, dtype=kind.dtype or pl.String)
    rows = pl.DataFrame([column, pl.Series("y", ["no", "yes"] * len(column))[: len(column)]])
    file = folder / ("t.csv" if kind.dtype is None else "t.parquet")
    if kind.dtype is None:
        rows.write_csv(file)
    else:
        rows.write_parquet(file)
    try:
        table = read_labelled(DataConfig(path=str(file), target="y", **kind.settings))
    except UserError as refusal:
        return f"refused: {str(refusal).removeprefix(f'{file}: ')}"
    kinds, (chunk,) = table.spool.kinds, table.spool.chunks
    if kinds.categorical:
        texts = table.spool.frame(chunk, ["x"], ())["x"].drop_nulls().unique().sort()
        return f"category: {', '.join(texts)}"
    form = f" ({kinds.readings[0].form})" if kinds.readings else ""
    if kinds.numeric != ("x",):
        return f"date{form}: {', '.join(name.removeprefix('x: ') for name in kinds.numeric)}"
    values = table.spool.frame(chunk, ["x"], kinds.readings)["x"]
    return f"number{form}: {', '.join('missing' if v != v else f'{v:.12g}' if v % 1 else f'{v:.0f}' for v in values)}"


def rows_of_page() -> list[str]:
    """The table of the page."""
    return ["| column | cells | becomes |", "| --- | --- | --- |", *(kind.row() for kind in KINDS)]


def main() -> None:
    """Write the table into the page."""
    page = Path(sys.argv[1])
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n".join([before + BEGIN, *rows_of_page(), END + after]))


if __name__ == "__main__":
    main()
