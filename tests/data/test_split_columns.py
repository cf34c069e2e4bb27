"""Splits by a time column, by a group column, and in folds: of files and stores, on any number of ranks."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from dist_train.config.load import load_config
from dist_train.config.rules import split_seed
from dist_train.data.dataset import load_dataset
from dist_train.data.tables.row_keys import INTEGERS, TIMES, group_keys, time_keys
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.run.split_record import split_codes
from tests.data.stores import ARGUMENTS, prepare_on_rank, table, write_parts
from tests.ranks import on_ranks

ALONE = Collectives(World())
BY_TIME, BY_GROUP = "data.time_column=month", "data.group_column=customer"


def dated_table() -> pl.DataFrame:
    random = np.random.default_rng(1)
    frame = table()
    months = [date(2020 + m // 12, m % 12 + 1, 1) for m in random.integers(0, 30, frame.height)]
    return frame.drop("part").with_columns(month=pl.Series(months), customer=random.integers(0, 200, frame.height))


def codes(path: Path, *arguments: str) -> np.ndarray:
    """Index in SPLITS of each row, 3: in none."""
    config = load_config([*ARGUMENTS, *arguments, f"data.path={path}"])
    dataset = load_dataset(config.data, ALONE, seed=split_seed(config), dtype=torch.float32)
    assert {"month", "customer"}.isdisjoint(c.name for c in (*dataset.spec.numeric, *dataset.spec.categorical))
    found = split_codes(dataset.splits)
    return np.concatenate([found, np.full(table().height - len(found), 3)])  # the last rows may be in none


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dated table as CSV."""
    path = tmp_path_factory.mktemp("dated") / "table.csv"
    dated_table().write_csv(path)
    return path


def test_the_latest_rows_are_test_and_those_before_them_validate(file: Path) -> None:
    found = codes(file, BY_TIME, "data.drop=[client,customer]")
    months = dated_table()["month"].to_physical().to_numpy()
    train, valid, test = (months[found == code] for code in range(3))
    assert max(train) < min(valid)
    assert max(valid) < min(test)
    assert 0.1 < len(test) / len(months) < 0.2


def test_a_customer_is_on_one_side(file: Path) -> None:
    frame = dated_table()
    for more in ("data.drop=[client,month]", f"{BY_TIME}"):
        found = codes(file, BY_GROUP, more)
        sides = frame.with_columns(side=pl.Series(found)).group_by("customer").agg(pl.col("side").n_unique())["side"]
        assert sides.max() == 1
        assert set(np.unique(found)) == {0, 1, 2}
    by_group = codes(file, BY_GROUP, "data.drop=[client,month]")
    assert (by_group != codes(file, BY_GROUP, "data.drop=[client,month]", "data.split_seed=3")).any()
    shares = np.bincount(by_group) / len(by_group)
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.02)


@pytest.mark.parametrize(
    "arguments",
    [
        [BY_TIME, "data.drop=[client,customer]"],
        [BY_GROUP, "data.drop=[client,month]"],
        [BY_GROUP, BY_TIME, "data.folds=3", "data.fold=1"],
        ["data.drop=[client,month,customer]", "data.folds=4", "data.fold=0"],
    ],
)
def test_a_store_has_the_split_of_the_file_on_any_number_of_ranks(
    file: Path, tmp_path: Path, arguments: list[str]
) -> None:
    patterns = write_parts(dated_table(), tmp_path / "files")
    on_ranks(2, prepare_on_rank, patterns, tmp_path / "store", arguments)
    assert (codes(tmp_path / "store", *arguments) == codes(file, *arguments)).all()
    with pytest.raises(UserError, match="was prepared with another configuration"):
        codes(tmp_path / "store", "data.drop=[client,month,customer]")


def test_every_row_that_is_not_test_validates_in_one_fold(file: Path) -> None:
    drop = "data.drop=[client,month,customer]"
    folds = np.stack([codes(file, drop, "data.folds=5", f"data.fold={fold}") for fold in range(5)])
    assert ((folds == 2) == (folds[0] == 2)).all()
    assert set((folds == 1).sum(0)[folds[0] != 2]) == {1}
    assert (codes(file, drop) == 2).tolist() == (folds[0] == 2).tolist()
    # Each fold has its share of each class.
    tiers = dated_table()["tier"].to_numpy()
    for tier in set(tiers):
        counts = (folds[:, tiers == tier] == 1).sum(1)
        assert counts.max() - counts.min() <= 1


def test_folds_leave_the_test_rows_of_a_split_column(tmp_path: Path) -> None:
    table().write_csv(tmp_path / "table.csv")
    column = table()["part"].to_numpy()
    path, arguments = tmp_path / "table.csv", ["data.split_column=part", "data.folds=2"]
    folds = np.stack([codes(path, *arguments, f"data.fold={fold}") for fold in range(2)])
    assert ((folds == 2) == (column == "test")).all()
    assert set((folds == 1).sum(0)[column != "test"]) == {1}


def test_folds_in_time_train_on_what_came_before(file: Path) -> None:
    months = dated_table()["month"].to_physical().to_numpy()
    arguments = [BY_TIME, "data.drop=[client,customer]", "data.folds=3"]
    folds = [codes(file, *arguments, f"data.fold={fold}") for fold in range(3)]
    for found in folds:
        assert max(months[found == 0]) < min(months[found == 1])
        assert max(months[found == 1]) < min(months[found == 2])
    for earlier, later in pairwise(folds):
        assert ((earlier != 1) | (later == 0)).all()  # what validated is trained on by the next fold
        assert ((earlier == 0) <= (later == 0)).all()


def test_times_have_the_order_of_the_calendar_in_every_notation() -> None:
    moments = [datetime(2023, 12, 31, 23, 59), datetime(2024, 1, 1), datetime(2024, 1, 1, 0, 0, 1)]
    column = pl.Series("t", moments)
    later = [(moment + timedelta(hours=2)).isoformat() for moment in moments]
    columns = [
        column,
        column.cast(pl.Datetime("ns")),
        column.dt.replace_time_zone("UTC"),
        pl.Series("t", [moment.isoformat(sep=sep) for moment, sep in zip(moments, " TT", strict=True)]),
        pl.Series("t", [text + zone for text, zone in zip(later, ("+02:00", "+0200", "+02"), strict=True)]),
    ]
    keys = [time_keys(column, "t") for column in columns]
    assert all(kind == TIMES and torch.equal(found, keys[0][0]) for found, kind in keys)
    assert time_keys(pl.Series("t", ["2024-02", "2024-01-31"]), "t")[0].diff().item() < 0
    for integers in ([202401, 202312], ["202401", "202312"], [202401.0, 202312.0]):
        assert time_keys(pl.Series("t", integers), "t")[1] == INTEGERS


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["2024-01-01", None], "the time 't' is missing in data row 2"),
        ([1.0, float("nan")], "the time 't' is missing in data row 2"),
        (["31/12/2024"], "data row 1: '31/12/2024' is no time"),
        (["2024-02-30"], "is no time"),
        (["2024-01-01", "20240101"], "data row 2: '20240101' is no time"),
        ([1.5], "is no time"),
        ([True], "has type Boolean"),
    ],
)
def test_a_cell_that_is_no_time_costs_one_line(cells: list[object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        time_keys(pl.Series("t", cells, strict=False), "t")


def test_a_missing_group_costs_one_line() -> None:
    with pytest.raises(UserError, match="the group 'g' is missing in data row 12"):
        group_keys(pl.Series("g", ["a", None]), "t", first_row=10)
    assert torch.equal(group_keys(pl.Series("g", [7, 8]), "t"), group_keys(pl.Series("g", ["7", "8.0"]), "t"))


def test_what_cannot_be_split_costs_one_line(file: Path, tmp_path: Path) -> None:
    frame = dated_table()
    frame.with_columns(month=pl.lit("2024-01-01")).write_csv(tmp_path / "one.csv")
    with pytest.raises(UserError, match="'month' has too few distinct times: no rows are left for the test split"):
        codes(tmp_path / "one.csv", BY_TIME, "data.drop=[client,customer]")
    frame.with_columns(customer=pl.lit("a")).write_csv(tmp_path / "group.csv")
    with pytest.raises(UserError, match="'customer' has too few distinct groups"):
        codes(tmp_path / "group.csv", BY_GROUP, "data.drop=[client,month]")
    (tmp_path / "files").mkdir()
    frame.write_csv(tmp_path / "files" / "a.csv")
    frame.with_columns(month=pl.lit(202401)).write_csv(tmp_path / "files" / "b.csv")
    with pytest.raises(UserError, match=r"no one order: dates in .*a.csv, data row 1 and whole numbers in .*b.csv"):
        prepare_on_rank(
            ALONE, [str(tmp_path / "files/*")], tmp_path / "store", [BY_TIME, "data.drop=[client,customer]"]
        )
    with pytest.raises(UserError, match="a store holds one split"):
        prepare_on_rank(ALONE, [str(file)], tmp_path / "folds", [BY_GROUP, "data.folds=3"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.time_column=t", "data.split_column=s"], "data.split_column=s says the splits already"),
        (["data.group_column=risk_tier"], "is the target"),
        (["data.group_column=g", "data.categorical=[g]"], "it is no feature"),
        (["data.group_column=g", "data.time_column=g"], "is data.time_column as well"),
        (["data.folds=1"], "must be at least 2"),
        (["data.fold=0"], "must be a fold"),
        (["data.folds=3", "data.fold=3"], "must be a fold of data.folds=3, counted from 0, is 3"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(arguments)
