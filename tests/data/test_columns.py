"""One table gives one spec and one encoding, whichever types, words and further columns its file has."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_train.config.schema import DataConfig
from dist_train.data.dataset import load_dataset, read_for_evaluation, read_labelled
from dist_train.data.encoding.encoder import Encoder, with_missing_cells
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.data.stores.prepare import fit_table, split_table
from dist_train.data.tables.frames import frame_of
from dist_train.data.tables.table import read_table
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError

pd = pytest.importorskip("pandas")
ROWS = 60
WORDS = DataConfig().missing_values


def classes() -> pa.Array:
    return pa.array([["no", "yes"][i % 2] for i in range(ROWS)])


def write(folder: Path, name: str = "t", **columns: pa.Array) -> Path:
    """A Parquet file of `ROWS` rows with a target `y`, and a feature `x` unless it has one."""
    given = {"x": pa.array(np.sin(np.arange(ROWS)))} | columns
    pq.write_table(pa.table(given | {"y": classes()}), folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def fitted(file: Path, **keys: object) -> FeatureSpec:
    data = DataConfig(**({"path": str(file), "target": "y"} | keys))  # type: ignore[arg-type]
    return load_dataset(data, Collectives(World()), seed=0, dtype=torch.float32).spec


def codes(spec: FeatureSpec, table: pl.DataFrame) -> list[int]:
    return Encoder(spec).to_arrays(with_missing_cells(table, spec, WORDS), "t").codes[:, 0].tolist()


def cells(*values: object) -> list[object]:
    return [values[i % len(values)] for i in range(ROWS)]


FORMS = {
    "decimals": [
        pa.array(cells("1.50", "2.25", "0.10")).cast(pa.decimal128(12, 2)),
        pa.array(cells(1.5, 2.25, 0.1)),
        pa.array(cells("1.50", "2.250", "1e-1")),
        pa.array(cells("1.5", "2.25", "0.1")).dictionary_encode(),
        pa.array(cells("1.500", "2.250", "0.100")).cast(pa.decimal256(50, 3)),
        pa.array(cells(b"1.50", b"2.25", b"0.1")),
    ],
    "integers": [
        pa.array(cells(1, 2, 30), pa.int8()),
        pa.array(cells(1, 2, 30), pa.uint64()),
        pa.array(cells(1.0, 2.0, 30.0), pa.float32()),
        pa.array(cells("1", "2.0", "3e1")),
        pa.array(cells(1, 2, 30)).dictionary_encode(),
        pa.array(cells("1", "2", "30")).cast(pa.decimal128(5, 0)),
    ],
    "large integers": [
        pa.array(cells(2**64 - 1, 2**53 + 1, 7), pa.uint64()),
        pa.array(cells(str(2**64 - 1), str(2**53 + 1), "7")),
        pa.array(cells(f"{2**64 - 1}.0", str(2**53 + 1), "7.0")),
    ],
    "floats": [
        pa.array(cells(1e20, 1e-7, -2.5)),
        pa.array(cells("1e+20", "0.0000001", "-2.50")),
        pa.array(cells("100000000000000000000", "1E-7", "-25e-1")),
    ],
    "booleans": [
        pa.array(cells(True, False, True)),
        pa.array(cells("True", "False", "TRUE")),
        pa.array(cells("t", "f", "t")),
        pa.array(cells(True, False, True)).dictionary_encode(),
    ],
    "dates": [
        pa.array(cells(datetime.date(2020, 1, 31), datetime.date(1999, 12, 1))),
        pa.array(cells(datetime.datetime(2020, 1, 31), datetime.datetime(1999, 12, 1)), pa.timestamp("ns")),
        pa.array(cells("2020-01-31", "1999-12-01 00:00:00")),
    ],
    "times of a zone": [
        pa.array(cells(datetime.datetime(2020, 1, 31, 7)), pa.timestamp("us", "+05:30")),
        pa.array(cells(datetime.datetime(2020, 1, 31, 7)), pa.timestamp("ms", "UTC")),
        pa.array(cells("2020-01-31T07:00:00Z", "2020-01-31 12:30:00+05:30")),
    ],
}


@pytest.mark.parametrize("name", FORMS)
def test_categories_do_not_depend_on_the_type_of_the_column(name: str, tmp_path: Path) -> None:
    """Neither do those of the training rows, nor those of rows to score."""
    files = [write(tmp_path, str(i), k=column) for i, column in enumerate(FORMS[name])]
    specs = [fitted(file, categorical=["k"]).categorical for file in files]
    assert all(spec == specs[0] for spec in specs)
    spec = fitted(files[0], categorical=["k"])
    expected = codes(spec, read_table(files[0], WORDS))
    assert min(expected) >= 2
    for file in files:
        table = read_table(file, WORDS)
        assert codes(spec, table) == expected
        assert codes(spec, frame_of(pq.read_table(file).to_pandas())) == expected
        table.write_csv(tmp_path / "t.csv")
        assert codes(spec, read_table(tmp_path / "t.csv", WORDS)) == expected


@pytest.mark.parametrize("of_training", [True, False])
def test_booleans_and_their_digits_are_the_same(of_training: bool, tmp_path: Path) -> None:
    """In training a column of digits is one of numbers, one of booleans has categories; each scores both."""
    forms = [pa.array(cells(True, False, True)), pa.array(cells(1, 0, 1)), pa.array(cells("True", "False", "true"))]
    forms += [pa.array(cells(1.0, 0.0, 1.0)), pa.array(cells("1", "0", "1"))]
    spec = fitted(write(tmp_path, k=forms[0] if of_training else forms[1]))
    tables = [read_table(write(tmp_path, "other", k=form), WORDS) for form in forms]
    inputs = [Encoder(spec).to_arrays(table, "t") for table in tables]
    assert spec.num_categorical == of_training
    for other in inputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(inputs[0], other, strict=True))


def test_pandas_columns_of_every_kind_are_the_same_categories(tmp_path: Path) -> None:
    spec = fitted(write(tmp_path, k=pa.array(cells("1", "2", None))), categorical=["k"])
    values = pd.Series([1, 2, None] * 20, dtype="Int64")
    forms: list[object] = [values, values.astype("float64"), values.astype("string"), values.astype("category")]
    forms += [values.astype("object"), values.astype("string").astype("category"), values.astype("int64[pyarrow]")]
    one, two = (2 + spec.categorical[0].categories.index(word) for word in ("1", "2"))
    for form in forms:
        frame = pd.DataFrame({"x": np.sin(np.arange(ROWS)), "k": form})
        records = frame.astype(object).where(frame.notna(), None).to_dict("records")
        for table in (frame, pl.from_pandas(frame), records):
            assert codes(spec, frame_of(table)) == cells(one, two, 0)


def test_a_column_without_values_is_missing_whatever_its_type(tmp_path: Path) -> None:
    spec = fitted(write(tmp_path, k=pa.array(cells("a", "b"))))
    for empty in (pa.nulls(ROWS), pa.nulls(ROWS, pa.int64()), pa.nulls(ROWS, pa.bool_()), pa.nulls(ROWS, pa.string())):
        assert codes(spec, read_table(write(tmp_path, "empty", k=empty), WORDS)) == [0] * ROWS


def test_classes_of_booleans_are_evaluated_on_digits(tmp_path: Path) -> None:
    columns = {"x": pa.array(np.sin(np.arange(ROWS)))}
    for name, cell in {"truth": (True, False), "digits": (1, 0)}.items():
        pq.write_table(pa.table(columns | {"y": pa.array(cells(*cell))}), tmp_path / f"{name}.parquet")
    data = DataConfig(path=str(tmp_path / "truth.parquet"), target="y")
    spec = fitted(tmp_path / "truth.parquet")
    expected = read_labelled(data, spec).spool
    table, _ = read_for_evaluation(tmp_path / "digits.parquet", data, spec, "test")
    assert torch.equal(table.spool.targets(table.spool.chunks[0]), expected.targets(expected.chunks[0]))


UNREADABLE = {
    "a list": pa.array(cells([1], [2, 3])),
    "bytes": pa.array(cells(b"\xff", b"\xfe")),
    "a map": pa.array(cells([("a", 1)]), pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_column_that_is_not_used_is_not_read(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, strange=UNREADABLE[name])
    spec = fitted(file, drop=["strange"])
    assert spec.names == ["x"]
    assert read_table(file, WORDS, spec.names).columns == ["x"]
    table, _ = read_for_evaluation(file, DataConfig(target="y"), spec, "test")
    assert table.spool.num_rows == ROWS
    with pytest.raises(UserError, match=r"column 'strange' has type .*data\.drop"):
        fitted(file)


def test_a_dropped_column_of_a_csv_file_is_not_read(tmp_path: Path) -> None:
    rows = "".join(f"{i / 7},\xff,{['no', 'yes'][i % 2]}\n" for i in range(ROWS))
    (tmp_path / "t.csv").write_bytes(f"x,memo,y\n{rows}".encode("latin-1"))
    assert fitted(tmp_path / "t.csv", drop=["memo"]).names == ["x"]


def test_a_table_in_memory_is_read_only_where_it_is_used() -> None:
    frame = pd.DataFrame({"a": [1.5, 2.5], "b": [complex(1, 2), complex(3, 4)]})
    assert frame_of(frame, wanted=["a"]).columns == ["a"]
    with pytest.raises(UserError, match="column 'b'"):
        frame_of(frame)


@pytest.mark.parametrize("name", ["__index_level_0__", "Unnamed: 0", "Unnamed: 0.1"])
def test_the_index_of_pandas_is_left_out(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, **{name: pa.array(np.random.default_rng(0).permutation(ROWS))})
    assert fitted(file).names == ["x"]
    assert fitted(file, categorical=[name]).names == ["x", name]


def test_an_index_with_a_name_is_left_out_where_the_file_says_that_it_is_one(tmp_path: Path) -> None:
    frame = pd.DataFrame({"loan": np.arange(ROWS) * 7 % 61, "x": np.sin(np.arange(ROWS)), "y": classes().to_pylist()})
    frame.set_index("loan").to_parquet(tmp_path / "index.parquet")
    frame.to_parquet(tmp_path / "column.parquet")
    assert fitted(tmp_path / "index.parquet").names == ["x"]
    assert fitted(tmp_path / "column.parquet").names == ["loan", "x"]


def test_the_index_that_pandas_and_r_write_without_a_name_is_left_out(tmp_path: Path) -> None:
    frame = pl.read_parquet(write(tmp_path)).to_pandas()
    frame[frame["x"] < 0.9].to_csv(tmp_path / "pandas.csv")
    assert fitted(tmp_path / "pandas.csv").names == ["x"]
    rows = "".join(f'"{i + 1}",{i / 7},"{["no", "yes"][i % 2]}"\n' for i in range(ROWS))
    (tmp_path / "r.csv").write_text(f'"","x","y"\n{rows}')
    assert fitted(tmp_path / "r.csv").names == ["x"]


@pytest.mark.parametrize("first", [0, 1])
def test_the_number_of_the_row_is_left_out(first: int, tmp_path: Path) -> None:
    numbers = np.arange(first, ROWS + first)
    file = write(tmp_path, row=pa.array(numbers), year=pa.array(numbers + 1900), b=pa.array(numbers % 7))
    assert fitted(file).names == ["x", "year", "b"]
    pl.read_parquet(file).write_csv(tmp_path / "t.csv")
    assert fitted(tmp_path / "t.csv").names == ["x", "year", "b"]


@pytest.mark.parametrize("word", ["NA", "", "null"])
def test_the_words_for_missing_mean_it_in_parquet_and_in_memory_too(word: str, tmp_path: Path) -> None:
    texts = {"number": ["1", "2", "4", word], "text": ["a", "b", "c", word]}
    file = write(tmp_path, **{name: pa.array(cells(*values)) for name, values in texts.items()})
    spec = fitted(file)
    pl.read_parquet(file).write_csv(tmp_path / "t.csv")
    assert spec == fitted(tmp_path / "t.csv")
    assert [column.name for column in spec.numeric] == ["x", "number"]
    assert spec.numeric[1].has_missing_flag
    assert set(spec.categorical[0].categories) == {"a", "b", "c"}
    assert codes(spec, frame_of(pl.read_parquet(file).to_dicts()))[3::4] == [0] * (ROWS // 4)


def test_a_model_of_a_former_release_keeps_its_categories(tmp_path: Path) -> None:
    """They could be words for "missing" in Parquet, and decimals as they were written."""
    spec = fitted(write(tmp_path, k=pa.array(cells("x", "b", "c"))))
    column = spec.to_json()["categorical"][0] | {"categories": ["NA", "1.50", "1.5"]}
    former = FeatureSpec.from_json(json.loads(json.dumps(spec.to_json() | {"categorical": [column]})))
    table = pl.DataFrame({"x": [0.0] * 4, "k": ["NA", "1.50", "1.5", "1.500"]})
    assert codes(former, table) == [2, 3, 4, 1]


def test_a_fit_over_ranks_and_files_merges_spellings(tmp_path: Path) -> None:
    file = write(tmp_path, k=pa.array(cells("1.50", "1.5", "2.25")))
    data = DataConfig(path=str(file), target="y", categorical=["k"])
    table, collectives = read_labelled(data), Collectives(World())
    split = split_table(table.spool, data, table.class_names, collectives, seed=0, source="t")
    spec = fit_table(table.spool, split, data, table.class_names, collectives, source="t")
    assert spec.categorical[0].categories == ("1.5", "2.25")
