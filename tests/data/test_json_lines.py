"""JSON lines: the table of the CSV file with the same cells; what is wrong with a line is said with its number."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest

from dist_train.config.schema import DataConfig
from dist_train.data.files import json_lines
from dist_train.data.files.readers import num_rows_of, read_header, read_parts, read_rows
from dist_train.errors import UserError

MISSING = DataConfig().missing_values
CSV = 'age,rate,purpose,owner\n1,1.50,car,true\n,2e3,NA,false\n3,,"a, b",\n'
LINES = [
    '{"age": 1, "rate": 1.50, "purpose": "car", "owner": true}',
    '{"age": null, "rate": 2e3, "purpose": "NA", "owner": false}',
    '{"owner": null, "purpose": "a, b", "age": 3}',
]


def rows_of(file: Path, columns: list[str] | None = None) -> pl.DataFrame:
    return pl.concat(read_rows(file, MISSING, columns=columns))


def file_of(folder: Path, *lines: str, name: str = "t.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES).encode(),
        ("\n\n".join(LINES) + "\n").encode(),
        ("\r\n".join(LINES) + "\r\n").encode(),
        b"\xef\xbb\xbf" + "\n".join(LINES).encode(),
    ],
    ids=["plain", "empty lines", "Windows", "byte-order mark"],
)
def test_the_cells_are_those_of_the_csv_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    (tmp_path / "t.jsonl").write_bytes(content)
    (tmp_path / "t.ndjson.gz").write_bytes(gzip.compress(content))
    expected = rows_of(tmp_path / "t.csv")
    assert expected.null_count().row(0) == (1, 1, 1, 1)
    for name in ("t.jsonl", "t.ndjson.gz"):
        assert read_header(tmp_path / name) == expected.columns
        assert rows_of(tmp_path / name).equals(expected)
        assert len(read_parts(tmp_path / name, 1)) == 1
        assert num_rows_of(tmp_path / name) is None


def test_rows_come_in_parts_that_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(tmp_path, *(f'{{"a": {i}, "b": "x{i}"}}' for i in range(10)))
    monkeypatch.setattr(json_lines, "_CELLS_AT_ONCE", 6)
    parts = list(read_rows(file, MISSING))
    assert [part.height for part in parts] == [3, 3, 3, 1]
    assert pl.concat(parts)["a"].to_list() == [str(i) for i in range(10)]


def test_a_column_that_is_not_read_may_hold_anything(tmp_path: Path) -> None:
    file = file_of(tmp_path, '{"a": 1, "b": [1, 2]}', '{"a": 2, "b": {"c": 3}}')
    assert rows_of(file, ["a"])["a"].to_list() == ["1", "2"]
    with pytest.raises(UserError, match="line 1 has a list in column 'b'"):
        rows_of(file)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["", ""], "the table has no rows"),
        (["{}"], "line 1 has no keys"),
        (['{"a": 1}', "[1]"], "line 2 holds no object"),
        (['{"a": 1}', '{"a": 1'], "line 2 is no JSON"),
        (['{"a": 1}', '{"b": 1}'], "line 2 has 'b', which line 1 has not"),
        (['{"a": 1, "a": 2}'], "line 1 is no JSON: a key stands twice"),
        (['{"a": 1}', '{"a": {"b": 1}}'], "line 2 has an object in column 'a'"),
        (['{"a": 1}', '{"a": "\\ud800"}'], "line 2 is no JSON: half of a pair of UTF-16"),
        (["[" * 100_000], "line 1 is no JSON: too deep"),
        (['{" ": 1}'], "column 1 has no name"),
    ],
)
def test_what_is_wrong_is_said_with_the_line(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(file_of(tmp_path, *lines))


def test_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        rows_of(file)
