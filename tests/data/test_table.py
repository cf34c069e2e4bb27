"""Reading tables: one table gives one set of values, whichever file it comes from."""

from __future__ import annotations

import struct
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from dist_train.config.schema import DataConfig
from dist_train.data.tables.table import as_text, locate, numbers, read_table
from dist_train.errors import UserError
from dist_train.system.files import sha256_of
from tests.data.kinds import feature_kinds

MISSING = DataConfig().missing_values


def test_where_a_file_was_looked_for_is_said_unless_the_path_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        locate("data/t.csv")
    assert str(caught.value) == f"data/t.csv: no such file (looked for in {tmp_path})"
    with pytest.raises(UserError) as caught:
        locate(f"{tmp_path}/t.csv")
    assert str(caught.value) == f"{tmp_path}/t.csv: no such file"


def read_csv(path: Path, content: bytes | str) -> pl.DataFrame:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, MISSING)


def both(frame: pl.DataFrame, folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The same table read back from CSV and from Parquet."""
    frame.write_csv(folder / "t.csv")
    frame.write_parquet(folder / "t.parquet")
    return read_table(folder / "t.csv", MISSING), read_table(folder / "t.parquet", MISSING)


NUMBERS = {
    "floats": pl.Series([0.1, -1 / 3, 1e-300, 3e38, None, 0.0]),
    "float32": pl.Series([0.1, -1 / 3, 1e-38, 3e38, None, 0.0], dtype=pl.Float32),
    "NaN is missing": pl.Series([0.5, float("nan"), None]),
    "integers": pl.Series([0, -5, 2**31, None]),
    "large integers": pl.Series([2**53 + 1, -(2**63), 2**63 - 1, 10**15]),
    "small unsigned integers": pl.Series([0, 255, None], dtype=pl.UInt8),
    "unsigned integers": pl.Series([0, 2**64 - 1], dtype=pl.UInt64),
    "decimals": pl.Series(["1.50", "-2.00", None]).cast(pl.Decimal(12, 2)),
    "nothing": pl.Series([None, None], dtype=pl.Float64),
    "untyped nothing": pl.Series([None, None], dtype=pl.Null),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_the_same_from_csv_and_parquet(name: str, tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": NUMBERS[name], "y": pl.Series(["text"] * len(NUMBERS[name]))})
    from_csv, from_parquet = both(frame, tmp_path)
    expected = NUMBERS[name].cast(pl.Float64).fill_null(float("nan"))
    for table in (from_csv, from_parquet):
        assert feature_kinds(table, ["y"], []).numeric == ("x",)
    torch.testing.assert_close(numbers(from_parquet["x"], "t"), expected.to_torch(), rtol=0, atol=0, equal_nan=True)
    # float32 cells are written as the shortest text that reads back as the same float32.
    tolerance = 1e-7 if name == "float32" else 0
    torch.testing.assert_close(numbers(from_csv["x"], "t"), expected.to_torch(), rtol=tolerance, atol=0, equal_nan=True)


CATEGORIES = {
    "text": pl.Series(["a", "b c", "ü, ö", 'say "no"', "two\nlines", None]),
    "codes with zeros in front": pl.Series(["007", "07", "7"]),
    "integers": pl.Series([1, -2, None, 2**40]),
    "whole floats": pl.Series([1.0, -2.0, None, -0.0, 1e15]),
    "mixed floats": pl.Series([1.0, 2.5, None, float("nan")]),
    "booleans": pl.Series([True, False, None]),
    "enumeration": pl.Series(["x", "y", None], dtype=pl.Enum(["y", "x"])),
    "categorical": pl.Series(["x", "y", None], dtype=pl.Categorical),
    "nothing": pl.Series([None, None], dtype=pl.String),
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_categories_are_the_same_from_csv_and_parquet(name: str, tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": CATEGORIES[name], "y": pl.Series([1] * len(CATEGORIES[name]))})
    from_csv, from_parquet = both(frame, tmp_path)
    for table in (from_csv, from_parquet):
        assert feature_kinds(table, [], ["x"]).categorical == ("x",)
    assert as_text(from_csv["x"], "t").to_list() == as_text(from_parquet["x"], "t").to_list()


def test_a_category_is_the_same_whichever_program_wrote_it() -> None:
    spellings = pl.Series(["1", "1.0", "1.000", "True", "TRUE", "true", "False", "-0.0"])
    assert as_text(spellings, "t").to_list() == ["1", "1", "1", "true", "true", "true", "false", "0"]
    assert as_text(pl.Series([1.0, -0.0]), "t").to_list() == ["1", "0"]


def test_a_category_does_not_depend_on_the_cells_around_it() -> None:
    """Else the vocabulary would depend on how rows are cut among ranks."""
    whole = pl.Series([1.0, 2.0, 2.5, 4.0, None])
    alone = [as_text(whole[i : i + 1], "t").item() for i in range(len(whole))]
    assert alone == as_text(whole, "t").to_list() == ["1", "2", "2.5", "4", None]


def test_texts_that_only_look_alike_stay_apart() -> None:
    texts = ["01", "1", "1.10", "1.1", "1.0.0", "a.0", "1e0", "truE", " 1", "+1"]
    assert as_text(pl.Series(texts), "t").to_list() == texts


@pytest.mark.parametrize("missing", MISSING)
def test_each_spelling_of_missing_is_missing(missing: str, tmp_path: Path) -> None:
    frame = read_csv(tmp_path / "t.csv", f'age,purpose\n{missing},"{missing}"\n1,car\n')
    assert frame.rows() == [(None, None), ("1", "car")]


def test_only_the_listed_spellings_are_missing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n-999,?\nNA,none\n")
    assert read_table(tmp_path / "t.csv", ["-999", "?"]).rows() == [(None, None), ("NA", "none")]


DIALECTS = {
    "plain": b"a,b\n1,x\n2,y\n",
    "no newline at the end": b"a,b\n1,x\n2,y",
    "windows": b"a,b\r\n1,x\r\n2,y\r\n",
    "byte-order mark": b"\xef\xbb\xbfa,b\n1,x\n2,y\n",
    "byte-order mark, windows, no end": b"\xef\xbb\xbfa,b\r\n1,x\r\n2,y",
    "all quoted": b'"a","b"\n"1","x"\n"2","y"\n',
    "blank lines": b"a,b\n\n1,x\n2,y\n\n",
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_reads_the_same(dialect: str, tmp_path: Path) -> None:
    frame = read_csv(tmp_path / "t.csv", DIALECTS[dialect])
    assert frame.columns == ["a", "b"]
    assert frame.rows() == [("1", "x"), ("2", "y")]


def test_quotes_hold_commas_newlines_and_quotes(tmp_path: Path) -> None:
    frame = read_csv(tmp_path / "t.csv", 'a,b\n"x,\ny","say ""no"""\nplain,"é"\n')
    assert frame.rows() == [("x,\ny", 'say "no"'), ("plain", "é")]


@pytest.mark.parametrize("content", ["age,purpose\n", "age,purpose", "age,purpose\r\n", "\ufeffage,purpose"])
def test_a_header_without_rows_is_a_table_of_no_rows(content: str, tmp_path: Path) -> None:
    frame = read_csv(tmp_path / "t.csv", content)
    assert frame.columns == ["age", "purpose"]
    assert frame.height == 0


def test_one_column_and_one_row_are_a_table(tmp_path: Path) -> None:
    assert read_csv(tmp_path / "t.csv", "age\n31").rows() == [("31",)]


@pytest.mark.parametrize("header", ["a,b,a", "a,a", '"a",a'])
def test_two_columns_of_one_name_are_refused(header: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two columns are named 'a'"):
        read_csv(tmp_path / "t.csv", f"{header}\n{'1,' * header.count(',')}1\n")


def test_spaces_around_numbers_are_no_stray_text(tmp_path: Path) -> None:
    frame = read_csv(tmp_path / "t.csv", "a,b\n 1, x\n2 ,y\n")
    assert numbers(frame["a"], "t").tolist() == [1.0, 2.0]


def test_stray_text_in_a_column_of_numbers_is_named_by_row(tmp_path: Path) -> None:
    frame = read_csv(tmp_path / "t.csv", "a\n1\n\n2\nabout 3\n4\n")
    with pytest.raises(UserError, match="t: column 'a', data row 3: 'about 3' is not a number"):
        feature_kinds(frame, [], [])


def test_numbers_among_text_are_categories(tmp_path: Path) -> None:
    frame = read_csv(tmp_path / "t.csv", "a\ncar\nhouse\n3\n")
    assert feature_kinds(frame, [], []).categorical == ("a",)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3.5e38, -1e300])
def test_what_float32_cannot_hold_is_named_by_row(value: float) -> None:
    with pytest.raises(UserError, match=r"t: column 'a', data row 2: .* is infinite or beyond float32"):
        numbers(pl.Series("a", [1.0, value, value]), "t")


def test_the_largest_float32_is_held() -> None:
    largest = torch.finfo(torch.float32).max
    assert numbers(pl.Series("a", [largest, -largest]), "t").float().isfinite().all()


@pytest.mark.parametrize("dtype", [pl.Date, pl.Time, pl.Datetime, pl.Duration])
def test_dates_are_features_unless_dropped(dtype: pl.DataType) -> None:
    frame = pl.DataFrame({"a": [1], "when": pl.Series([1], dtype=pl.Int64).cast(dtype)})
    kinds = feature_kinds(frame, [], [])
    assert [reading.column for reading in kinds.readings] == ["when"]
    assert kinds.numeric == ("a", *kinds.readings[0].features)
    assert feature_kinds(frame, ["when"], []).numeric == ("a",)


def test_kinds_keep_the_order_of_the_table() -> None:
    frame = pl.DataFrame({"z": [1], "b": ["x"], "a": [2], "c": ["y"], "code": [3]})
    kinds = feature_kinds(frame, [], ["code"])
    assert kinds.numeric == ("z", "a")
    assert kinds.categorical == ("b", "c", "code")


def test_the_built_in_data_set_reads() -> None:
    file = locate("builtin:credit_card_risk")
    frame = read_table(file, MISSING)
    assert frame.height > 1000
    assert {"risk_tier", "split"} <= set(frame.columns)
    assert len(sha256_of(file)) == 64


def test_a_long_row_of_a_wide_table_reads(tmp_path: Path) -> None:
    """Arrow reads in blocks: a file of several blocks, and a cell of a tenth of a block."""
    rows = [f'{i},"{"long " * 20_000}\n"' for i in range(30)]
    frame = read_csv(tmp_path / "t.csv", "a,b\n" + "\n".join(rows))
    assert frame["a"].to_list() == [str(i) for i in range(30)]


def test_text_of_a_parquet_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    cell = "größer".encode("latin-1")
    offsets = struct.pack("<2i", 0, len(cell))
    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(cell)])
    pyarrow.parquet.write_table(pa.table({"purpose": column}), tmp_path / "t.parquet", use_dictionary=False)
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read as parquet: .*Invalid UTF8"):
        read_table(tmp_path / "t.parquet", MISSING)


def test_a_bit_that_flips_in_a_page_with_a_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    values = pa.table({"x": pa.array(range(1000), pa.int64())})
    pyarrow.parquet.write_table(values, path, use_dictionary=False, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<q", 500))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read as parquet: .*checksum"):
        read_table(path, MISSING)
