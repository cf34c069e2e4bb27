"""Cells that the model has not seen the like of are named with their share, by predict and by evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from tests.cli.conftest import Trained
from tests.cli.in_process import command, command_on_ranks
from tests.cli.tables import clients

UNKNOWN = "column 'purpose': 75% of the cells are categories that the model does not know"


def three_quarters_unknown() -> pl.DataFrame:
    rows = pl.int_range(pl.len())
    frame = clients().drop_nulls("purpose").head(80)
    return frame.with_columns(purpose=pl.when(rows % 4 > 0).then(pl.lit("yacht")).otherwise("purpose"))


def test_predict_names_columns_of_unknown_categories(trained: Trained, tmp_path: Path) -> None:
    three_quarters_unknown().write_csv(tmp_path / "in.csv")
    outcome = command("predict", trained.folder, tmp_path / "in.csv", tmp_path / "out.csv")
    assert outcome.code == 0, outcome.err
    assert UNKNOWN in outcome.err
    found = json.loads(outcome.out)
    assert found["drift"].keys() == {"purpose"}
    assert found == {"rows": 80, "unknown_categories": {"purpose": 0.75}, "drift": found["drift"]}


def test_evaluate_names_columns_of_unknown_categories(trained: Trained, tmp_path: Path) -> None:
    three_quarters_unknown().write_parquet(tmp_path / "in.parquet")
    outcome = command("evaluate", trained.folder, "--data", tmp_path / "in.parquet")
    assert outcome.code == 0, outcome.err
    assert UNKNOWN in outcome.err
    assert json.loads(outcome.out)["test"]["unknown_categories"] == {"purpose": 0.75}


def test_a_category_in_another_spelling_is_named_however_few_there_are(trained: Trained, tmp_path: Path) -> None:
    frame = clients().drop_nulls("purpose").head(80)
    first = frame["purpose"][0]
    purposes = [f" {first.upper()}", *frame["purpose"].to_list()[1:]]
    frame.with_columns(purpose=pl.Series(purposes)).write_parquet(tmp_path / "in.parquet")
    outcome = command("predict", trained.folder, tmp_path / "in.parquet", tmp_path / "out.csv")
    assert outcome.code == 0, outcome.err
    assert f"column 'purpose': the model knows {first!r}, and not ' {first.upper()}'" in outcome.err
    assert json.loads(outcome.out)["spelled_otherwise"] == {"purpose": {f" {first.upper()}": first}}


def test_numbers_outside_of_the_range_are_named_and_may_be_refused(trained: Trained, tmp_path: Path) -> None:
    frame = clients().head(80).with_columns(age=pl.when(pl.int_range(80) % 4 > 0).then(pl.lit(900)).otherwise("age"))
    frame.write_csv(tmp_path / "in.csv")
    outcome = command("predict", trained.folder, tmp_path / "in.csv", tmp_path / "out.csv")
    assert outcome.code == 0, outcome.err
    assert "column 'age': 75% of the numbers are outside of the range of the training rows" in outcome.err
    assert json.loads(outcome.out)["outside_training_range"] == {"age": 0.75}
    refused = command("predict", trained.folder, tmp_path / "in.csv", tmp_path / "no.csv", "--refuse-unfamiliar")
    assert refused.code == 2
    assert "is unlike the training rows (--refuse-unfamiliar): column 'age'" in refused.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.csv", "out.csv"]
    clients().write_csv(tmp_path / "known.csv")
    accepted = command("predict", trained.folder, tmp_path / "known.csv", tmp_path / "yes.csv", "--refuse-unfamiliar")
    assert accepted.code == 0, accepted.err


def test_columns_that_have_moved_are_named_on_every_number_of_ranks_alike(trained: Trained, tmp_path: Path) -> None:
    frame = clients(300).with_columns(pl.col("age").clip(60))
    frame.write_csv(tmp_path / "in.csv")
    alone = command("predict", trained.folder, tmp_path / "in.csv", tmp_path / "out.csv", "--drift")
    assert alone.code == 0, alone.err
    assert "drift against the training rows, population stability index" in alone.err
    assert "'age' (" in alone.err
    drift = json.loads(alone.out)["drift"]
    assert drift["age"] > 1 > 0.1 > drift["purpose"] >= 0
    two = command_on_ranks(2, "predict", trained.folder, tmp_path / "in.csv", tmp_path / "two.csv", "--drift")
    assert json.loads(two[0].out)["drift"] == drift
    moved = command("evaluate", trained.folder, "--data", tmp_path / "in.csv")
    assert json.loads(moved.out)["test"]["drift"] == {"age": drift["age"]}
    accepted = command("predict", trained.folder, tmp_path / "in.csv", tmp_path / "yes.csv", "--refuse-unfamiliar")
    assert accepted.code == 0, accepted.err


def test_known_rows_are_not_remarked_upon(trained: Trained, tmp_path: Path) -> None:
    clients().write_parquet(tmp_path / "in.parquet")
    outcome = command("predict", trained.folder, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert outcome.code == 0, outcome.err
    assert "column" not in outcome.err
    assert outcome.out == ""


def test_missing_cells_are_named_where_training_had_none(trained: Trained, tmp_path: Path) -> None:
    frame = clients().with_columns(age=pl.lit(None, pl.Int64))
    frame.write_parquet(tmp_path / "in.parquet")
    outcome = command("predict", trained.folder, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert outcome.code == 0, outcome.err
    assert "column 'age': 100% of the cells are missing, and none was in training" in outcome.err
    assert json.loads(outcome.out)["missing_unlike_training"] == {"age": 1.0}
