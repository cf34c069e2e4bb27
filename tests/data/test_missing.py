"""A word for "missing" in every type that holds its value."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
import torch

from dist_train.config.schema import DataConfig
from dist_train.data.cells.missing import without_missing_words
from dist_train.data.dataset import load_dataset
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World

WORDS = ["NA", "-999", "1900-01-01", "inf"]


@pytest.mark.parametrize(
    ("cells", "dtype", "present"),
    [
        (["NA", "-999", "-999.0", "-9.99e2", "-0999", "-998"], pl.String, ["-0999", "-998"]),
        (["inf", "Infinity", "-inf", "1"], pl.String, ["-inf", "1"]),
        ([-999, 0, 999], pl.Int16, [0, 999]),
        ([999, 1], pl.UInt8, None),
        ([-999.0, float("inf"), -999.5, float("-inf")], pl.Float64, [-999.5, float("-inf")]),
        ([-999.0, float("inf"), 1.5], pl.Float32, [1.5]),
        ([Decimal("-999.00"), Decimal("-999.01")], pl.Decimal(9, 2), [Decimal("-999.01")]),
        ([date(1900, 1, 1), date(1900, 1, 2)], pl.Date, [date(1900, 1, 2)]),
        ([datetime(1900, 1, 1), datetime(1900, 1, 1, 1)], pl.Datetime("us"), [datetime(1900, 1, 1, 1)]),
        (["1900-01-01", "1900-01-01 00:00:00", "1900-01-02"], pl.String, ["1900-01-02"]),
        ([True, False], pl.Boolean, [True, False]),
    ],
)
def test_a_word_means_its_value_in_every_type(
    cells: list[object], dtype: pl.DataType, present: list[object] | None
) -> None:
    column = pl.Series("x", [*cells[:1], None, *cells[1:]], dtype=dtype, strict=False)
    result = without_missing_words(column, WORDS)
    assert result.dtype == column.dtype
    assert len(result) == len(column)
    expected = column.drop_nulls().to_list() if present is None else present
    assert result.drop_nulls().to_list() == expected


def test_a_large_integer_beside_the_word_is_kept() -> None:
    column = pl.Series("x", [2**53 + 1, 2**53])
    assert without_missing_words(column, [str(2**53 + 1)]).to_list() == [None, 2**53]


def test_a_category_of_a_former_release_is_kept() -> None:
    assert without_missing_words(pl.Series("x", ["-999", "NA"]), WORDS, ["-999"]).to_list() == ["-999", None]
    assert without_missing_words(pl.Series("x", [-999, 1]), WORDS, ["-999"]).to_list() == [-999, 1]


def test_a_zone_does_not_hide_a_moment() -> None:
    column = pl.Series("x", [datetime(1900, 1, 1, tzinfo=UTC), datetime(1900, 1, 2, tzinfo=UTC)])
    assert without_missing_words(column, ["1900-01-01T00:00:00Z"])[0] is None
    assert without_missing_words(column, ["1900-01-01T01:00:00+01:00"]).null_count() == 1


def test_csv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "x": [float(i % 7) if i % 5 else -999.0 for i in range(60)],
            "k": [i % 4 if i % 9 else -999 for i in range(60)],
            "y": ["no" if i % 3 else "yes" for i in range(60)],
        }
    )
    table.write_csv(tmp_path / "t.csv")
    table.write_parquet(tmp_path / "t.parquet")
    rows = []
    for name in ("t.csv", "t.parquet"):
        data = DataConfig(path=str(tmp_path / name), target="y", categorical=["k"], missing_values=["-999"])
        dataset = load_dataset(data, Collectives(World()), seed=0, dtype=torch.float32)
        assert [column.name for column in dataset.spec.numeric if column.has_missing_flag] == ["x"]
        rows.append(dataset.splits["train"].slice(0, 30))
    for a, b in zip(*rows, strict=True):
        assert torch.equal(a, b)
