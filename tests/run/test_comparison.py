"""Runs side by side, and the runs of a sweep file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dist_train.config.sweep import runs_of_sweep
from dist_train.errors import UserError
from dist_train.run.comparison import comparison_of
from tests.cli.in_process import command
from tests.commands import REPOSITORY, environment
from tests.resume.jobs import run_job, tiny_job

QUICK = ("train.max_steps=20", "train.early_stopping_patience=null", "train.ema_decay=null")


def write_table(folder: Path) -> Path:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 400))
    grade = np.where(x + rng.normal(size=400) / 2 > 0, "good", "bad")
    pl.DataFrame({"x": x, "y": y, "grade": grade}).write_csv(folder / "table.csv")
    return folder / "table.csv"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run, one that has learned nothing, and one of another table."""
    folder = tmp_path_factory.mktemp("comparison")
    table = write_table(folder)
    other = folder / "other.csv"
    pl.read_csv(table).reverse().write_csv(other)
    for name, data, keys in (("good", table, ()), ("idle", table, ("optim.lr=1e-9",)), ("other", other, ())):
        ended = run_job(tiny_job(data, folder / name, *QUICK, "train.ema_warmup=false", *keys))
        assert ended.codes == [0], ended.errors
    return [folder / name for name in ("good", "idle", "other")]


def test_configurations_metrics_and_paired_differences(runs: list[Path]) -> None:
    found = comparison_of(runs[:2])
    assert found["runs"] == ["good", "idle"]
    assert found["configuration"]["different"] == {"optim.lr": [0.05, 1e-9]}
    assert found["configuration"]["same"]["model.hidden_dim"] == 16
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs[:2]]
    assert found["metrics"]["test"]["auroc"] == [summary["test"]["auroc"] for summary in summaries]
    (line,) = found["differences"]
    shipped = [summary["test"]["calibrated"]["loss"] for summary in summaries]
    assert line["loss"]["difference"] == pytest.approx(shipped[1] - shipped[0], abs=1e-12)
    low, high = line["loss"]["interval"]
    assert low < line["loss"]["difference"] < high
    assert found["curves"]["good"]["train"]
    assert comparison_of(runs[:2]) == found


def test_the_command_and_its_page(runs: list[Path], tmp_path: Path) -> None:
    done = command("compare", *runs, "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert done.out.index("Keys that differ") < done.out.index("optim.lr") < done.out.index("Metrics of the valid rows")
    assert "other: its data are others than those of the first run" in done.out
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert re.search(r"(src|href)=\"http", page) is None
    assert page.count("<figure>") == 2
    assert "model.hidden_dim" in page


def test_data_that_are_gone_leave_the_rest(runs: list[Path], tmp_path: Path) -> None:
    for run in runs[:2]:
        shutil.copytree(run, tmp_path / run.name)
        config = tmp_path / run.name / "config.yaml"
        config.write_text(config.read_text().replace("table.csv", "gone.csv"))
    done = command("compare", tmp_path / "good", tmp_path / "idle")
    assert done.code == 0, done.err
    assert "gone.csv" in done.err
    assert "Keys that differ" in done.out


def test_mistakes(runs: list[Path], tmp_path: Path) -> None:
    for arguments, message in (
        ([runs[0]], "needs two runs or more"),
        ([runs[0], runs[0]], "named twice"),
        ([runs[0], tmp_path], "is not a run folder"),
        ([*runs, "--html", tmp_path / "no" / "page.html"], "cannot be written"),
    ):
        done = command("compare", *arguments)
        assert done.code == 2
        assert message in done.err
        assert len(done.err.strip().splitlines()) <= 2  # a note on the run of other data


def test_names_of_the_runs_of_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "sweep.txt"
    file.write_text("optim.lr=0.01 model.dropout=[0.1,0.2]\noptim.lr=0.02\nrun.name=mine run.seed=4\n")
    runs = runs_of_sweep(file, ["run.name=it's"])
    assert [config.run.name for config, _ in runs] == ["it's-lr=0.01-dropout=_0.1_0.2_", "it's-lr=0.02", "mine"]
    assert runs[1][0].optim.lr == 0.02
    file.write_text("optim.lr=0.01\noptim.lr=0.01\n")
    with pytest.raises(UserError, match="two lines are the run"):
        runs_of_sweep(file, [])
    file.write_text("optim.lr=0.01\noptim.rl=0.01\n")
    with pytest.raises(UserError, match=r"line 2: .*optim\.rl"):
        runs_of_sweep(file, [])
    file.write_text(f"data.target={'x' * 300}\n")
    assert len(runs_of_sweep(file, [])[0][0].run.name) < 130


def sweep_arguments(folder: Path) -> list[str]:
    data = [*tiny_job(write_table(folder), folder / "base", *QUICK), "train.ema_warmup=false"]
    (folder / "sweep.txt").write_text("optim.lr=0.05\noptim.lr=1e-9\n")
    return [str(folder / "sweep.txt"), *data]


@pytest.mark.slow
def test_a_sweep_trains_its_lines_once_and_ends_with_their_comparison(tmp_path: Path) -> None:
    arguments = sweep_arguments(tmp_path)
    done = command("sweep", *arguments, "--jobs", "2")
    assert done.code == 0, done.err
    first, second = tmp_path / "base-lr=0.05", tmp_path / "base-lr=1e-9"
    assert (tmp_path / "base-lr=0.05.log").is_file()
    head = next(line for line in done.out.splitlines() if line.startswith("  key"))
    assert head.split() == ["key", first.name, second.name]  # that of the lower validation loss first
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    again = command("sweep", *arguments)
    assert again.code == 0, again.err
    assert again.out == done.out
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_line_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    arguments = sweep_arguments(tmp_path)
    (tmp_path / "sweep.txt").write_text("data.target=nothing\noptim.lr=0.05\n")
    done = command("sweep", *arguments, "--jobs", "2")
    assert done.code == 1
    assert "1 of 2 runs are not finished: base-target=nothing: ended with exit code 2" in done.err
    assert (tmp_path / "base-lr=0.05" / "summary.json").is_file()


@pytest.mark.slow
def test_a_signal_stops_the_run_saved_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = [*sweep_arguments(tmp_path), "train.max_steps=100000", "train.epochs=10000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_train", "sweep", *arguments], cwd=REPOSITORY, env={**os.environ, **environment()}
    )
    metrics = tmp_path / "base-lr=0.05" / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 1
    assert list((tmp_path / "base-lr=0.05" / "checkpoints").iterdir())
    assert not (tmp_path / "base-lr=1e-9").exists()
