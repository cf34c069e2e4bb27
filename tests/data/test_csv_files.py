"""CSV files as programs write them: each reads as the same table, and what is not plain is said."""

from __future__ import annotations

import bz2
import gzip
import logging
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from dist_train.config.schema import DataConfig
from dist_train.data.files.readers import read_header
from dist_train.data.tables.table import read_table
from dist_train.errors import UserError

MISSING = DataConfig().missing_values
PLAIN = b"age,purpose,note\n1,car,x\n2,house,\n"
ROWS = [("1", "car", "x"), ("2", "house", None)]


def zstd(content: bytes) -> bytes:
    compressed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return compressed


FILES: dict[str, tuple[str, bytes, str]] = {
    "commas": ("t.csv", PLAIN, ""),
    "semicolons": ("t.csv", PLAIN.replace(b",", b";"), "separated by semicolons"),
    "tabs": ("t.tsv", PLAIN.replace(b",", b"\t"), "separated by tabs"),
    "tabs in a .csv file": ("t.csv", PLAIN.replace(b",", b"\t"), "separated by tabs"),
    "vertical bars": ("t.csv", PLAIN.replace(b",", b"|"), "separated by vertical bars"),
    "semicolons and a byte-order mark": ("t.csv", b"\xef\xbb\xbf" + PLAIN.replace(b",", b";"), "semicolons"),
    "semicolons, a comma within a name": (
        "t.csv", b'"age";"purpose";"note"\n1;car;x\n2;house;\n', "separated by semicolons"),
    "Excel's line that names the separator": ("t.csv", b"sep=;\r\n" + PLAIN.replace(b",", b";"), "semicolons"),
    "gzip": ("t.csv.gz", gzip.compress(PLAIN), ""),
    "zstd": ("t.csv.zst", zstd(PLAIN), ""),
    "bz2": ("t.csv.bz2", bz2.compress(PLAIN), ""),
    "gzip and tabs": ("t.tsv.gz", gzip.compress(PLAIN.replace(b",", b"\t")), "tabs"),
    "upper-case name": ("T.CSV", PLAIN, ""),
    "Windows": ("t.csv", PLAIN.replace(b"\n", b"\r\n"), ""),
    "no line break at the end": ("t.csv", PLAIN.rstrip(b"\n"), ""),
    "UTF-16": ("t.csv", PLAIN.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 with tabs, as Excel writes it": ("t.csv", PLAIN.replace(b",", b"\t").decode().encode("utf-16"), "UTF-16"),
    "comments above the header": ("t.csv", b"# made on Monday\n# by us, twice\n" + PLAIN, "first 2 lines"),
    "spaces around names": ("t.csv", PLAIN.replace(b"age,purpose", b" age ,purpose "), ""),
    "empty lines": ("t.csv", PLAIN.replace(b"\n", b"\n\n"), ""),
    "all quoted": ("t.csv", b'"age","purpose","note"\n"1","car","x"\n"2","house",""\n', ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_reads_as_the_same_table(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    caplog.set_level(logging.INFO)
    file_name, content, said = FILES[name]
    file = tmp_path / file_name
    file.write_bytes(content)
    assert read_header(file) == ["age", "purpose", "note"]
    assert read_table(file, MISSING).rows() == ROWS
    lines = caplog.messages
    assert lines == [] if not said else any(said in line for line in lines), lines


LETTERS = {
    "Latin-1": "latin-1",
    "Windows-1252": "cp1252",
}


@pytest.mark.parametrize("name", LETTERS)
def test_a_file_that_is_not_utf_8_is_read_as_windows_1252_and_said_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    caplog.set_level(logging.INFO)
    (tmp_path / "t.csv").write_bytes("town,n\nKöln,1\nLe Mée,2\n".encode(LETTERS[name]))
    assert read_table(tmp_path / "t.csv", MISSING)["town"].to_list() == ["Köln", "Le Mée"]
    assert any("is not UTF-8: it is read as Windows-1252" in line for line in caplog.messages)


def test_letters_of_latin_1_far_down_in_a_file_are_read(tmp_path: Path) -> None:
    """The first 4 MiB are ASCII."""
    head = b"a,b\n" + b"x,1\n" * (5 << 18)
    (tmp_path / "t.csv").write_bytes(head + "Köln,2\n".encode("latin-1") * 3)
    frame = read_table(tmp_path / "t.csv", MISSING)
    assert frame.height == (5 << 18) + 3
    assert frame["a"][-1] == "Köln"


def test_utf_8_is_still_utf_8(tmp_path: Path) -> None:
    """A letter that is cut by the end of a block among them."""
    cells = ["größer" * 30, "ß" * 11, "日本"] * 9000
    pl.DataFrame({"a": cells, "b": range(len(cells))}).write_csv(tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv", MISSING)["a"].to_list() == cells


MIXED = {
    "a comma file with a semicolon in a name": ('"a;b",c\n1,2\n', ["a;b", "c"]),
    "decimal commas between semicolons": ("a;b;c\n1,5;2,5;x\n2,5;3,5;y\n", ["a", "b", "c"]),
    "semicolons within cells of a comma file": ("a,b\n1;2;3,x\n4;5,y\n", ["a", "b"]),
    "one column": ("a\n1\n2\n", ["a"]),
    "one column, commas within quotes": ('a\n"1,5"\n"2,5"\n', ["a"]),
    "a quoted line break": ('a;b\n"1\n2";x\n3;y\n', ["a", "b"]),
    "a header that begins with #": ("#id,b\n1,x\n2,y\n", ["#id", "b"]),
}


@pytest.mark.parametrize("name", MIXED)
def test_the_separator_is_the_one_that_cuts_every_row_alike(name: str, tmp_path: Path) -> None:
    content, names = MIXED[name]
    (tmp_path / "t.csv").write_text(content)
    assert read_table(tmp_path / "t.csv", MISSING).columns == names


@pytest.mark.parametrize("line", ["0.94,-1.4,46,1", "46,2,2,1", "5.1", "700,12,3", "1e3,4,5"])
def test_a_file_without_a_header_line_is_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"{line}\n{line}\n")
    with pytest.raises(UserError, match=r"t\.csv: its first line holds numbers alone.*write the names of the columns"):
        read_header(file)


@pytest.mark.parametrize("line", ["0,1,2,3", "64,61,62,63", "2019,2021,2025", "0,1,y", "1.5,rate"])
def test_numbers_that_may_name_columns_are_names(line: str, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"{line}\n{line}\n")
    assert read_header(file) == line.split(",")


def test_names_that_differ_by_spaces_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a, a\n1,2\n")
    with pytest.raises(UserError, match="two columns are named 'a'"):
        read_table(tmp_path / "t.csv", MISSING)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv.zst", "t.csv.bz2"])
def test_a_damaged_compressed_file_is_named(name: str, tmp_path: Path) -> None:
    content = PLAIN * 50
    whole = {"t.csv.gz": gzip.compress(content), "t.csv.zst": zstd(content), "t.csv.bz2": bz2.compress(content)}[name]
    for content in (PLAIN, whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: cannot be read as csv: "):
            read_table(tmp_path / name, MISSING)


def test_a_compressed_file_of_many_blocks_reads(tmp_path: Path) -> None:
    rows = 300_000
    frame = pl.DataFrame({"a": range(rows), "b": ["some text"] * rows})
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(frame.write_csv().encode(), 1))
    assert read_table(tmp_path / "t.csv.gz", MISSING)["a"].cast(pl.Int64).to_list() == frame["a"].to_list()


def test_utf_16_that_ends_within_a_letter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(PLAIN.decode().encode("utf-16")[:-1])
    with pytest.raises(UserError, match=r"t\.csv: "):
        read_table(tmp_path / "t.csv", MISSING)
