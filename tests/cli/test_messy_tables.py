"""A table as spreadsheets write it: trained, prepared, evaluated and scored by the forms that training found."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dist_train.data.stores.store import MANIFEST
from tests.cli.in_process import command
from tests.cli.tables import QUICK
from tests.cli.test_mistakes import assert_one_message
from tests.data.stores import prepare_on_rank
from tests.ranks import on_ranks

ROWS = 400
ARGUMENTS = [*QUICK, "data.target=y", "wandb.mode=disabled", "runtime.device=cpu"]


def messy() -> pl.DataFrame:
    """Amounts, shares, balances, two forms of dates and a category, as texts."""
    random = np.random.default_rng(3)
    y = random.integers(0, 2, ROWS)
    amounts = np.exp(random.normal(8, 1, ROWS)) * (1 + 2 * y)
    days = [date(2014, 1, 1) + timedelta(days=int(n)) for n in random.integers(0, 700, ROWS)]
    return pl.DataFrame(
        {
            "amount": [f"${v:,.2f}" if v < 9000 else f"(${v:,.2f})" for v in amounts],
            "rate": [f"{v:.2f}%" for v in random.uniform(3, 20, ROWS)],
            "balance": [f"{v:,}" if v > 900 else None for v in random.integers(0, 90_000, ROWS)],
            "issued": [d.strftime("%b-%Y") for d in days],
            "opened": [d.strftime("%m/%d/%Y") for d in days],
            "grade": random.choice(["A", "B", "C"], ROWS),
            "y": [["paid", "late"][i] for i in y],
        }
    )


def clean(frame: pl.DataFrame) -> pl.DataFrame:
    """The same values in the types of a Parquet file."""
    negative = pl.col("amount").str.starts_with("(")
    amount = pl.col("amount").str.replace_all("[^0-9.]", "").cast(pl.Float64)
    return frame.with_columns(
        pl.when(negative).then(-amount).otherwise(amount).alias("amount"),
        pl.col("rate"),
        pl.col("balance").str.replace_all(",", "").cast(pl.Int64),
        pl.col("opened").str.to_date("%m/%d/%Y"),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `t.csv`, `t.parquet` and the run `csv`."""
    folder = tmp_path_factory.mktemp("messy")
    messy().write_csv(folder / "t.csv")
    clean(messy()).write_parquet(folder / "t.parquet")
    done = command("train", *ARGUMENTS, f"run.dir={folder}", "run.name=csv", f"data.path={folder / 't.csv'}")
    assert done.code == 0, done.err
    for said in ("amount", "rate", "balance", "issued", "opened"):
        assert f"column '{said}': " in done.err
    assert "data.formats={balance: '1.234,56'}" in done.err
    return folder


def spec_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "model" / "task.json").read_text())["spec"]
    return content


def scores(run: Path, file: Path, folder: Path) -> pl.DataFrame:
    done = command("predict", run, file, folder / "scores.parquet")
    assert done.code == 0, done.err
    return pl.read_parquet(folder / "scores.parquet")


def test_the_model_keeps_the_forms_and_the_latest_training_date(runs: Path) -> None:
    spec = spec_of(runs / "csv")
    forms = {reading["column"]: reading["form"] for reading in spec["readings"]}
    assert forms == {
        "amount": "1,234.56 $", "rate": "1,234.56 %", "balance": "1,234.56", "issued": "date",
        "opened": "month/day/year",
    }  # fmt: skip
    assert [column["name"] for column in spec["categorical"]] == ["grade"]
    features = {column["name"]: column for column in spec["numeric"]}
    assert features["issued: days"]["quantiles"][-1] == features["opened: days"]["quantiles"][-1] == 0
    assert "issued: weekday sine" not in features
    assert "opened: weekday sine" in features


def test_typed_cells_are_scored_as_their_texts_are(runs: Path, tmp_path: Path) -> None:
    assert scores(runs / "csv", runs / "t.parquet", tmp_path).equals(scores(runs / "csv", runs / "t.csv", tmp_path))


def test_a_model_evaluates_its_own_file_and_another_one(runs: Path) -> None:
    own, other = (command("evaluate", runs / "csv", *more) for more in ((), ("--data", runs / "t.parquet")))
    assert own.code == other.code == 0, own.err + other.err
    assert json.loads(other.out)["rows"] == ROWS if "rows" in json.loads(other.out) else True


CELLS = {
    "amount": ("€5.00", "1,234.56 $"),
    "rate": ("0.12", "1,234.56 %"),
    "opened": ("31/12/2015", "month/day/year"),
    "issued": ("soon", "date"),
}


@pytest.mark.parametrize("column", CELLS)
def test_a_cell_of_another_form_is_named(column: str, runs: Path, tmp_path: Path) -> None:
    cell, form = CELLS[column]
    frame = messy()
    cells = [*frame[column][:6], cell, *frame[column][7:]]
    frame.with_columns(pl.Series(column, cells)).write_csv(tmp_path / "in.csv")
    for outcome in (
        command("predict", runs / "csv", tmp_path / "in.csv", tmp_path / "out.csv"),
        command("evaluate", runs / "csv", "--data", tmp_path / "in.csv"),
    ):
        assert_one_message(outcome, f"column {column!r}", "data row 7", repr(cell), form)
    assert not (tmp_path / "out.csv").exists()


def test_a_missing_amount_or_date_is_scored(runs: Path, tmp_path: Path) -> None:
    frame = messy().with_columns(opened=None, amount=None)
    frame.write_csv(tmp_path / "in.csv")
    assert scores(runs / "csv", tmp_path / "in.csv", tmp_path).drop("predicted_class").to_numpy().min() >= 0


def write_files(frame: pl.DataFrame, folder: Path) -> list[str]:
    """Four files; of one all balances are plain numbers, one is Parquet with types."""
    small = frame.filter(pl.col("balance").is_null()).with_columns(balance=pl.lit("12"))
    rest = frame.filter(pl.col("balance").is_not_null())
    small.write_csv(folder / "a.csv")
    rest[:100].write_csv(folder / "b.csv")
    clean(rest[100:150]).write_parquet(folder / "c.parquet")
    rest[150:].write_csv(folder / "d.csv", separator=";")
    return [str(folder / name) for name in ("a.csv", "b.csv", "c.parquet", "d.csv")]


def test_a_store_of_several_files_is_the_same_on_one_and_on_three_ranks(tmp_path: Path) -> None:
    files = write_files(messy(), tmp_path)
    arguments = ["data.target=y", "data.drop=[]", "data.categorical=[]"]
    for ranks in (1, 3):
        on_ranks(ranks, prepare_on_rank, files, tmp_path / f"store{ranks}", arguments)
    one, three = (json.loads((tmp_path / f"store{ranks}" / MANIFEST).read_text()) for ranks in (1, 3))
    assert one["data_sha256"] == three["data_sha256"]
    assert {r["column"]: r["form"] for r in one["spec"]["readings"]} == {
        "amount": "1,234.56 $", "rate": "1,234.56 %", "balance": "1,234.56", "issued": "date",
        "opened": "month/day/year",
    }  # fmt: skip
    done = command("train", *ARGUMENTS, f"data.path={tmp_path / 'store1'}", f"run.dir={tmp_path}", "run.name=r")
    assert done.code == 0, done.err
    assert spec_of(tmp_path / "r") == one["spec"]
    messy().write_csv(tmp_path / "t.csv")
    assert scores(tmp_path / "r", tmp_path / "t.csv", tmp_path).height == ROWS


def test_a_date_that_could_be_another_one_asks_for_its_form(tmp_path: Path) -> None:
    frame = messy().with_columns(opened=pl.lit("03/04/2015"))
    frame.write_csv(tmp_path / "t.csv")
    arguments = [*ARGUMENTS, f"run.dir={tmp_path}", "run.name=r", f"data.path={tmp_path / 't.csv'}"]
    assert_one_message(command("train", *arguments), "'opened'", "data.formats={opened: day/month/year}")
    done = command("train", *arguments, "data.formats={opened: day/month/year}")
    assert done.code == 0, done.err
    readings = {reading["column"]: reading["form"] for reading in spec_of(tmp_path / "r")["readings"]}
    assert readings["opened"] == "day/month/year"


def test_a_form_that_there_is_not_is_named(tmp_path: Path) -> None:
    messy().write_csv(tmp_path / "t.csv")
    arguments = [*ARGUMENTS, f"run.dir={tmp_path}", "run.name=r", f"data.path={tmp_path / 't.csv'}"]
    assert_one_message(command("train", *arguments, "data.formats={opened: d/m/y}"), "data.formats", "'d/m/y'")
    assert_one_message(command("train", *arguments, "data.formats={opener: date}"), "'opener'", "opened")
