"""The split is written beside the run, and its seed need not be that of the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import polars as pl

from dist_train.config.load import load_config
from dist_train.distributed.world import World
from dist_train.run.job import train
from tests.resume.jobs import tiny_job, write_table


def _trained(folder: Path, *overrides: str) -> tuple[dict[str, Any], pl.Series, dict[str, Any]]:
    """split.json, the split of each row, and the summary of a short run."""
    table = folder / "table.csv"
    if not table.exists():
        write_table(table)
    arguments = tiny_job(table, folder / "run", "train.epochs=1", "run.resume=never", *overrides)
    summary = train(load_config(arguments), World(), {})
    assert summary is not None
    record = json.loads((folder / "run" / "split.json").read_text())
    return record, pl.read_parquet(folder / "run" / "split.parquet")["split"], summary


def test_a_sweep_of_seeds_is_tested_on_the_same_rows(tmp_path: Path) -> None:
    first, rows, _ = _trained(tmp_path, "run.seed=1", "data.split_seed=7")
    second, same, _ = _trained(tmp_path, "run.seed=2", "data.split_seed=7")
    other, _, _ = _trained(tmp_path, "run.seed=2")
    assert rows.equals(same)
    assert first == second
    assert other["rows_sha256"] != first["rows_sha256"]
    assert (first["seed"], other["seed"]) == (7, 2)


def test_without_a_seed_of_its_own_the_split_is_that_of_the_run_seed(tmp_path: Path) -> None:
    own, _, one = _trained(tmp_path, "run.seed=3")
    told, _, two = _trained(tmp_path, "run.seed=3", "data.split_seed=3")
    assert own == told
    assert one["weights_sha256"] == two["weights_sha256"]


def test_the_record_counts_every_row_once(tmp_path: Path) -> None:
    record, split, summary = _trained(tmp_path)
    table = pl.read_csv(tmp_path / "table.csv").drop("split", strict=False)
    assert len(split) == table.height
    counted = table.with_columns(split).group_by("split", "grade").len()
    for name, grade, rows in counted.with_columns(pl.col("grade").cast(pl.String)).iter_rows():
        assert record["rows_of_classes"][name][grade] == rows
    assert record["rows"] == {name: sum(of.values()) for name, of in record["rows_of_classes"].items()}
    codes = split.to_physical().cast(pl.UInt8).to_numpy()
    assert hashlib.sha256(codes.tobytes()).hexdigest() == record["rows_sha256"]
    assert record["data_sha256"] == summary["data_sha256"]
