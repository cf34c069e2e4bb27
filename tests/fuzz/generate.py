"""Tables and configurations as nobody would write them on purpose. A case is a function of its number and a seed."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl

from dist_train.config import families
from dist_train.config.load import load_config

WORDS = [
    "", " ", "a", "low", "high", "yes", "no", "true", "False", "null", "NA", "N/A", "nan", "None", "-", "?", "???", "~",
    "=", "0", "1", "-1", "007", "1.10", "1e3", "1e400", "-inf", "Infinity", "0x1F", "1_000", "1,000", "1.000,5",
    "$12,098.79", "9.51%", "€5", "12:30", "2024-01-31", "31/01/2024", "2024-01-31T10:00:00Z", "99999999999999999999",
    "1" * 400, "ü", "größer", "日本", "😀", "a\nb", "a\tb", "\x1b[31m", "\x9b", "\u202e", "\u2028", "\xa0", "\ufeff",
    "\x00", "[x]", "[/x]", "{a}", "${x}", "\\${x}", "${oc.env:HOME}", "'", '"', "a'b", 'a"b', "a,b", "a;b", "a|b",
    "a b", "#", "*", "&a", "!!int 3", "a" * 300, "__index_level_0__", "target", "y", "split", "probability_a",
    "predicted_class", "train", "valid", "test", "\\",
]  # fmt: skip
NUMBERS = ["0", "1", "2", "-1", "0.5", "1e-3", "3e8", str(2**63), "1" * 30, "nan", "inf", "true", "null", "auto"]
REFERRED = ["nope", "oc.env:HOME", "oc.env:NOPE", "run", "oc.create:{a: 1}", "oc.decode:3", ""]
LINES = ["&a", "*a", "- a", "---", "...", "%YAML", "? a", "<<: *a", "!!set {a}", "\ta: b", "a: |\n  b"]
NAMES = ["a", "b", "c", "income", "Unnamed: 0", *WORDS]


@dataclass(frozen=True)
class Case:
    """Arguments of `train`, and a table for `predict` beside that of the configuration; None: only the arguments."""

    arguments: list[str]
    table: Path | None = None
    other: Path | None = None


def make_case(number: int, seed: int, folder: Path) -> Case:
    """The case of this number; its files are in `folder`."""
    draw = random.Random(f"{seed}:{number}")
    return _configuration(draw, folder) if draw.random() < 0.4 else _table(draw, folder)


def _configuration(draw: random.Random, folder: Path) -> Case:
    arguments = [_argument(draw) for _ in range(draw.choice([0, 1, 1, 2, 3]))]
    for name in ("a.yaml", "b=c.yaml")[: draw.choice([0, 0, 1, 2])]:
        text = "\n".join(_yaml(draw) for _ in range(draw.randint(0, 4)))
        (folder / name).write_bytes(_damaged(draw, text.encode("utf-8", "surrogatepass")))
        arguments.append(str(folder / name))
    draw.shuffle(arguments)
    return Case(arguments)


def _keys() -> list[str]:
    sections: dict[str, dict[str, Any]] = asdict(families.complete_config([]))
    keys = []
    for section, values in sections.items():
        for key, value in values.items():
            inside = value if section == "model" and isinstance(value, dict) else {}
            keys += [f"{section}.{key}", *(f"{section}.{key}.{name}" for name in inside)]
    return keys


KEYS = _keys()


def _key(draw: random.Random) -> str:
    key = draw.choice(KEYS)
    kind = draw.random()
    if kind < 0.05:
        return key.partition(".")[0]
    if kind < 0.1:
        return key + draw.choice(["+", "++", ".x", "[0]", ".", "..a", " ", ".a.b.c", "+.a"])
    if kind < 0.13:
        return draw.choice(WORDS)
    if kind < 0.2:
        return f"train.class_weights.{draw.choice(WORDS)}"
    return key


def _value(draw: random.Random, depth: int = 0) -> str:
    kind = draw.random()
    if kind < 0.35:
        return draw.choice(WORDS)
    if kind < 0.55:
        return draw.choice(
            ["0", "1", "2", "-1", "0.5", "1e-3", "3e8", str(2**63), "1" * 30, "nan", "inf", "true", "null", "auto"]
        )
    if kind < 0.65:
        return draw.choice(["'", '"', ""]) + draw.choice(WORDS) + draw.choice(["'", '"', ""])
    if kind < 0.75:
        return "${" + draw.choice([*KEYS, *REFERRED]) + "}"
    if kind < 0.85 and depth < 3:
        return "[" + ", ".join(_value(draw, depth + 1) for _ in range(draw.randint(0, 3))) + draw.choice(["]", "]", ""])
    if depth < 3:
        inside = (f"{draw.choice(WORDS)}: {_value(draw, depth + 1)}" for _ in range(draw.randint(0, 3)))
        return "{" + ", ".join(inside) + draw.choice(["}", "}", ""])
    return "".join(
        chr(draw.choice([draw.randrange(32, 127), draw.randrange(0x250)])) for _ in range(draw.randint(0, 8))
    )


def _argument(draw: random.Random) -> str:
    if draw.random() < 0.03:
        return draw.choice([*WORDS, "nowhere.yaml", "/", ".yaml", "=.yaml"]).replace("\0", "")
    return f"{_key(draw)}={_value(draw)}"


def _yaml(draw: random.Random) -> str:
    kind = draw.random()
    section, _, name = _key(draw).partition(".")
    if kind < 0.7:
        return f"{section}:\n  {name}: {_value(draw)}"
    if kind < 0.8:
        return f"{section}: {_value(draw)}"
    if kind < 0.9:
        return f"{section}:\n  {name}:\n  - {_value(draw)}\n  - {_value(draw)}"
    return draw.choice(
        ["&a", "*a", "- a", "---", "...", "%YAML", "? a", "<<: *a", "!!set {a}", "\ta: b", "a: |\n  b", _value(draw)]
    )


def _damaged(draw: random.Random, content: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.9 or not content:
        return content
    if kind < 0.93:
        return content[: draw.randrange(len(content))]
    if kind < 0.97:
        place = draw.randrange(len(content))
        return content[:place] + draw.randbytes(draw.randint(1, 3)) + content[place + 1 :]
    return draw.choice(
        [b"\xef\xbb\xbf" + content, content.decode(errors="replace").encode("utf-16"), gzip.compress(content)]
    )


def _table(draw: random.Random, folder: Path) -> Case:
    kind = draw.choice(["csv", "csv", "csv", "parquet", "parquet", "csv.gz", "tsv"])
    table, other = folder / f"t.{kind}", folder / f"o.{draw.choice(['csv', 'parquet'])}"
    names = list(dict.fromkeys(draw.choice(NAMES) for _ in range(draw.randint(1, 6))))
    target = draw.choice(names)
    columns = {name: _column(draw) for name in names}
    rows = draw.choice([0, 1, 2, 3, 7, 30, 80])
    if draw.random() < 0.6:
        columns[target] = _target
    _write(draw, table, {name: column(draw, rows) for name, column in columns.items()})
    shifted = {name: (column if draw.random() < 0.8 else _column(draw)) for name, column in columns.items()}
    rows = draw.choice([rows, 3])
    _write(draw, other, {name: column(draw, rows) for name, column in shifted.items()})
    arguments = [f"data.path={table}", f"data.target={target}", "runtime.device=cpu", "wandb.mode=disabled"]
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        arguments.append(_data_argument(draw, names))
    return Case([a.replace("\0", "") for a in arguments], table, other)


def _data_argument(draw: random.Random, names: list[str]) -> str:
    key = draw.choice([key for key in KEYS if key.startswith(("data.", "train.", "model.")) and key.count(".") == 1])
    if key in ("data.path", "data.target"):
        key = "data.drop"
    if draw.random() < 0.5:
        quoted = [name.replace("'", "''") for name in draw.sample(names, draw.randint(0, len(names)))]
        return (
            draw.choice(["data.drop", "data.categorical", "data.missing_values+"])
            + "=["
            + ", ".join(f"'{n}'" for n in quoted)
            + "]"
        )
    return f"{key}={draw.choice([_value(draw), draw.choice(names)])}"


DTYPES: list[Any] = [
    pl.Int8, pl.UInt64, pl.Int64, pl.Float32, pl.Categorical, pl.String, pl.Boolean, pl.Decimal(20, 3), pl.Null,
    pl.Datetime("ns", "Europe/Berlin"),
]  # fmt: skip
Column = Callable[[random.Random, int], list[Any]]


def _target(draw: random.Random, rows: int) -> list[Any]:
    known: list[list[Any]] = [["a", "b"], ["yes", "no"], [0, 1], [True, False], ["1", "2", "3"], [0.0, 1.0]]
    classes = draw.choice([*known, draw.sample(WORDS, 3)])
    return [draw.choice(classes) for _ in range(rows)]


def _column(draw: random.Random) -> Column:
    maker: Callable[[random.Random], Any] = draw.choice(MAKERS)
    missing = draw.choice([0.0, 0.0, 0.1, 0.5, 1.0])

    def cells(draw: random.Random, rows: int) -> list[Any]:
        return [None if draw.random() < missing else maker(draw) for _ in range(rows)]

    return cells


def _some_words(draw: random.Random) -> str:
    return draw.choice(WORDS)


MAKERS: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.gauss(0, 1),
    lambda draw: draw.gauss(0, 1),
    lambda draw: draw.choice([0.0, 1.5, float("nan"), float("inf"), 1e300, -1e-300, 5e-324]),
    lambda draw: draw.randint(-5, 5),
    lambda draw: draw.randint(-(2**63), 2**63 - 1),
    lambda draw: draw.random() < 0.5,
    _some_words,
    _some_words,
    lambda draw: draw.choice(["car", "house", "boat"]),
    lambda draw: f"{draw.randint(0, 99999):05d}",
    lambda draw: f"${draw.randint(0, 99999):,}.{draw.randint(0, 99):02d}",
    lambda draw: f"{draw.random() * 100:.2f}%",
    lambda draw: f"{draw.random() * 1000:.2f}".replace(".", ","),
    lambda draw: date(2000, 1, 1) + timedelta(days=draw.randint(-40000, 40000)),
    lambda draw: datetime(2000, 1, 1) + timedelta(seconds=draw.randint(-(10**9), 10**9)),
    lambda draw: time(draw.randint(0, 23), draw.randint(0, 59)),
    lambda draw: timedelta(seconds=draw.randint(0, 10**6)),
    lambda draw: Decimal(draw.randint(-(10**6), 10**6)) / 100,
    lambda draw: draw.randbytes(3),
    lambda draw: [draw.randint(0, 9)],
    lambda draw: {"x": draw.randint(0, 9)},
    lambda draw: draw.choice([1, 2.5, "x", True]),
    lambda _draw: None,
]


def _write(draw: random.Random, file: Path, columns: dict[str, list[Any]]) -> None:
    if file.suffix == ".parquet":
        frame = pl.DataFrame([_series(draw, name, cells) for name, cells in columns.items()])
        frame.write_parquet(file)
        content = file.read_bytes()
    else:
        content = _csv(draw, columns)
    content = _damaged(draw, content) if draw.random() < 0.3 else content
    if file.suffix == ".gz" and draw.random() < 0.9:
        content = gzip.compress(content)
    file.write_bytes(content)


def _series(draw: random.Random, name: str, cells: list[Any]) -> pl.Series:
    try:
        series = pl.Series(name, cells, strict=True)
    except (TypeError, pl.exceptions.PolarsError, OverflowError):
        series = pl.Series(name, [None if cell is None else str(cell) for cell in cells], dtype=pl.String)
    if draw.random() < 0.3:
        wanted: Any = draw.choice(DTYPES)
        try:
            series = series.cast(wanted, strict=False)
        except pl.exceptions.PolarsError:
            return series
    return series


def _csv(draw: random.Random, columns: dict[str, list[Any]]) -> bytes:
    separator = draw.choice([",", ",", ",", ";", "\t", "|"])
    careless = draw.random() < 0.1
    missing = draw.choice(["", "", "NA", "null", "-", "None"])

    def cell(value: Any) -> str:
        text = missing if value is None else str(value)
        if careless or not any(c in text for c in (separator, '"', "\n", "\r")):
            return text
        return '"' + text.replace('"', '""') + '"'

    rows = zip(*columns.values(), strict=False)
    lines = [separator.join(map(cell, columns)), *(separator.join(map(cell, row)) for row in rows)]
    end = draw.choice(["\n", "\n", "\r\n", "\r"])
    text = end.join(lines) + draw.choice([end, "", end + end])
    return text.encode(draw.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16", "cp1252"]), "replace")


load_config([])  # once, before processes are forked
