"""Folds: predictions out of fold cover every row once, and the runs of the folds become one model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import dist_train
from dist_train.config.load import load_config
from dist_train.config.members import members_of
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.run.job import train
from tests.resume.jobs import tiny_job, write_table

PROBABILITIES = ["probability_high", "probability_low", "probability_middle"]


def _table(folder: Path) -> pl.DataFrame:
    """The tiny table with a customer and a month for each row."""
    draw = random.Random(2)
    table = pl.read_csv(write_table(folder / "table.csv"))
    customers = [draw.randrange(60) for _ in range(table.height)]
    months = [f"202{draw.randrange(3)}-{draw.randrange(1, 13):02d}" for _ in range(table.height)]
    table = table.with_columns(customer=pl.Series(customers), month=pl.Series(months))
    table.write_csv(folder / "table.csv")
    return table


def _train(folder: Path, *more: str) -> dict[str, Any]:
    arguments = tiny_job(folder / "table.csv", folder / "run", "train.max_steps=8", *more)
    summary = train(load_config(arguments), World(), {})
    assert summary is not None
    return summary


GROUPED = ("data.folds=3", "data.group_column=customer", "data.drop=[month]")
IN_TIME = ("data.folds=3", "data.time_column=month", "data.drop=[customer]")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], pl.DataFrame]:
    """An ensemble of three folds of whole customers and two seeds, its summary, and its table."""
    folder = tmp_path_factory.mktemp("folds")
    table = _table(folder)
    return folder, _train(folder, *GROUPED, "ensemble.seeds=2"), table


def _splits(run: Path, member: str, rows: int) -> list[str | None]:
    found = pl.read_parquet(run / member / "split.parquet")["split"].cast(pl.String).to_list()
    return found + [None] * (rows - len(found))


def test_predictions_out_of_fold_cover_every_row_once(grouped: tuple[Path, dict[str, Any], pl.DataFrame]) -> None:
    folder, summary, table = grouped
    found = pl.read_parquet(folder / "run" / "out_of_fold.parquet")
    test = {i for i, split in enumerate(_splits(folder / "run", "fold_0_seed_0", table.height)) if split == "test"}
    assert found["row"].to_list() == [row for row in range(table.height) if row not in test]
    assert found["target"].to_list() == table["grade"].gather(found["row"]).to_list()
    assert summary["valid"]["rows"] == found.height
    for fold, of_fold in found.group_by("fold"):
        name = f"fold_{fold[0]}"
        splits = _splits(folder / "run", f"{name}_seed_1", table.height)
        assert {splits[row] for row in of_fold["row"]} == {"valid"}
        rows = table[of_fold["row"].to_list()]
        runs = [folder / "run" / f"{name}_seed_{i}" for i in range(2)]
        members = [dist_train.load(run, calibrated=False).predict_proba(rows) for run in runs]
        assert np.allclose(of_fold.select(PROBABILITIES).to_numpy(), np.mean(members, 0), atol=1e-6)
        train_rows = [row for row, split in enumerate(splits) if split == "train"]
        assert not set(table["customer"].gather(train_rows)) & set(rows["customer"])


def test_the_model_is_the_mean_of_all_runs(grouped: tuple[Path, dict[str, Any], pl.DataFrame]) -> None:
    folder, summary, table = grouped
    names = [member["name"] for member in summary["ensemble"]["members"]]
    assert names == [f"fold_{fold}_seed_{seed}" for fold in range(3) for seed in range(2)]
    members = [dist_train.load(folder / "run" / name, calibrated=False).predict_proba(table) for name in names]
    model = dist_train.load(folder / "run", calibrated=False)
    assert np.allclose(model.predict_proba(table), np.mean(members, 0), atol=1e-12)
    assert model.evaluate("test")["loss"] == pytest.approx(summary["test"]["loss"], abs=1e-12)
    with pytest.raises(UserError, match="each fold of an ensemble has other valid rows"):
        model.evaluate("valid")


def test_folds_that_were_trained_one_by_one_are_joined(
    grouped: tuple[Path, dict[str, Any], pl.DataFrame], tmp_path: Path
) -> None:
    """As the elements of a job array train them: `data.fold`, in the folders that the whole looks into."""
    folder, _, _ = grouped
    table = folder / "table.csv"
    for fold in (2, 0):
        single = ["train.max_steps=8", *GROUPED, f"data.fold={fold}"]
        assert train(load_config(tiny_job(table, tmp_path / "run" / f"fold_{fold}", *single)), World(), {})
    checkpoints = tmp_path / "run" / "fold_2" / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")}
    whole = train(load_config(tiny_job(table, tmp_path / "run", "train.max_steps=8", *GROUPED)), World(), {})
    assert whole is not None
    assert {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")} == before
    assert [member["name"] for member in whole["ensemble"]["members"]] == ["fold_0", "fold_1", "fold_2"]


def test_folds_in_time_cover_all_rows_after_the_first_window(tmp_path: Path) -> None:
    table = _table(tmp_path)
    summary = _train(tmp_path, *IN_TIME)
    found = pl.read_parquet(tmp_path / "run" / "out_of_fold.parquet")
    assert found["row"].is_unique().all()
    splits = [_splits(tmp_path / "run", f"fold_{fold}", table.height) for fold in range(3)]
    first = {row for row, split in enumerate(splits[0]) if split == "train"}
    test = {row for row, split in enumerate(splits[0]) if split == "test"}
    assert set(found["row"]) == set(range(table.height)) - first - test
    assert max(table["month"][row] for row in first) < min(table["month"][row] for row in found["row"])
    assert max(table["month"][row] for row in found["row"]) < min(table["month"][row] for row in test)
    record = json.loads((tmp_path / "run" / "fold_0" / "split.json").read_text())
    assert record["rule"]["time_column"] == "month"
    assert sum(record["rows"].values()) < table.height  # the later windows are in no split
    assert summary["test"]["rows"] == len(test)


def test_a_store_holds_one_split(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="a store holds one split: prepare one for each"):
        train(load_config(tiny_job(tmp_path / "store", tmp_path / "run", *GROUPED)), World(), {})
    assert not (tmp_path / "run").exists()


def test_members_are_folds_times_seeds() -> None:
    config = load_config(["data.folds=2", "ensemble.seeds=2", "data.split_column=null", "run.seed=3"])
    members = members_of(config)
    assert [(m.name, m.config.data.fold, m.config.run.seed) for m in members] == [
        ("fold_0_seed_0", 0, 3), ("fold_0_seed_1", 0, 4), ("fold_1_seed_0", 1, 3), ("fold_1_seed_1", 1, 4),
    ]  # fmt: skip
    assert members_of(load_config(["data.folds=2", "data.fold=1"])) == []
