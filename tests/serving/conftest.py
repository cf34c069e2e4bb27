"""A table of every kind of column, and models of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.cli.in_process import command

NUM_ROWS = 400
# The table without dates and durations, which take an exporter most of its time.
PLAIN = ["data.drop=[since,birth,call]", "model.hidden_dim=8"]


def everything(num_rows: int = NUM_ROWS) -> pl.DataFrame:
    """Numbers with holes, whole numbers, texts, truths, codes of digits, dates, times, amounts, durations."""
    random = np.random.default_rng(3)
    risk = random.integers(0, 2, num_rows)
    seconds = random.integers(1_500_000_000, 1_700_000_000, num_rows)
    income = np.round(np.exp(random.normal(10, 1, num_rows)) * (risk + 1), 2)
    return pl.DataFrame(
        {
            "income": pl.Series(income).set(pl.Series(random.random(num_rows) < 0.2), None),
            "age": random.integers(18, 90, num_rows),
            "flat": pl.Series([1.5] * num_rows),
            "purpose": random.choice(["car", "house", "träume, groß"], num_rows).tolist(),
            "owner": random.random(num_rows) < 0.5,
            "branch": [["007", "012", None][i] for i in random.integers(0, 3, num_rows)],
            "since": pl.from_epoch(pl.Series(seconds), time_unit="s"),
            "birth": pl.from_epoch(pl.Series(seconds - 1_300_000_000), time_unit="s").dt.date(),
            "limit": [f"{value:,.2f} EUR" for value in income],
            "call": [f"{value // 60}:{value % 60:02d}:30" for value in random.integers(0, 600, num_rows)],
            "default": [["no", "yes"][r] for r in risk],
        }
    )


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_of(name, key=value, ...)`: a run folder; the same name is the same run."""
    folder = tmp_path_factory.mktemp("served")
    everything().write_parquet(folder / "table.parquet")

    def train(name: str, *keys: str) -> Path:
        run = folder / "runs" / name
        if not (run / "summary.json").exists():
            outcome = command(
                "train", f"run.dir={run.parent}", f"run.name={name}", f"data.path={folder / 'table.parquet'}",
                "data.target=default", "train.epochs=2", "train.global_batch_size=64", "schedule.warmup_steps=1",
                "optim.lr=0.05", "wandb.mode=disabled", "runtime.device=cpu", *keys,
            )  # fmt: skip
            assert outcome.code == 0, outcome.err
        return run

    return train


@pytest.fixture(scope="session")
def plain_onnx(model_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of the table without dates."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return exported(model_of("plain", *PLAIN), tmp_path_factory.mktemp("onnx") / "model.onnx")


def exported(run: Path, output: Path, *more: str) -> Path:
    outcome = command("export", run, output, *more)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["rows"] == 1000
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return output
