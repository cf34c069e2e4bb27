"""A run ships the calibration of its validation rows, and what reads the model applies it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

import dist_train
from dist_train.risk.calibration import calibration_from_json, fit_calibration
from dist_train.run.checkpoint.commit import commit
from dist_train.run.checkpoint.state import encode_parts, read_parts
from tests.cli.in_process import command
from tests.resume.jobs import finish, folder_of, run_job, tiny_job

# Learns rows by heart whose classes are mostly chance, and ships the last weights: too confident.
OVERFITTED = (
    "train.max_steps=200", "train.early_stopping_patience=null", "train.ema_decay=null", "train.accumulation_steps=1",
    "evaluation.every_steps=200", "checkpoint.every_steps=200", "model.dropout=0",
    "model.hidden_dim=64", "optim.lr=0.02", "data.validation_fraction=0.3", "train.virtual_ranks=2",
)  # fmt: skip


def write_noise(folder: Path) -> Path:
    """A table of two classes of which most is chance, with weights of rows."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 10))
    grade = np.where(x[:, 0] + x[:, 1] + rng.normal(size=400) > 0, "good", "bad")
    columns = {f"x{i}": x[:, i] for i in range(10)} | {"exposure": rng.integers(0, 3, 400), "grade": grade}
    pl.DataFrame(columns).write_csv(folder / "table.csv")
    return folder / "table.csv"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    arguments = tiny_job(write_noise(folder), folder / "run", *OVERFITTED, "data.weight=exposure")
    finish(arguments)
    return folder_of(arguments)


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def own_and_calibrated(run: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    table = pl.read_csv(run.parent / "table.csv")
    return tuple(dist_train.load(run, calibrated=wanted).predict_proba(table) for wanted in (False, None))  # type: ignore[return-value]


def test_the_summary_has_the_metrics_of_both(trained: Path) -> None:
    summary = summary_of(trained)
    assert summary["calibration"] == json.loads((trained / "model" / "calibration.json").read_text())
    assert summary["calibration"]["temperature"] > 1.2
    for split in ("valid", "test"):
        assert summary[split]["calibrated"]["loss"] < summary[split]["loss"]
        assert summary[split]["calibrated"]["accuracy"] == summary[split]["accuracy"]
    for name in ("test", "valid"):
        assert dist_train.load(trained).evaluate(name) == summary[name]


def test_it_is_fitted_to_the_weighted_validation_rows(trained: Path) -> None:
    own, _ = own_and_calibrated(trained)
    table = pl.read_csv(trained.parent / "table.csv")
    valid = (pl.read_parquet(trained / "split.parquet")["split"] == "valid").to_numpy()
    targets = (table["grade"] == "good").to_numpy().astype(np.int64)
    weights = table["exposure"].to_numpy().astype(np.float64)
    fitted = fit_calibration("temperature", own[valid], targets[valid], weights[valid])
    shipped = summary_of(trained)["calibration"]
    assert fitted.calibration.parameters()["temperature"] == pytest.approx(shipped["temperature"], rel=1e-5)


def test_predictions_are_calibrated_unless_told_otherwise(trained: Path, tmp_path: Path) -> None:
    own, calibrated = own_and_calibrated(trained)
    shipped = calibration_from_json(summary_of(trained)["calibration"], "")
    assert np.array_equal(shipped(own), calibrated)
    table = trained.parent / "table.csv"
    for flags, expected in (((), calibrated), (("--uncalibrated",), own)):
        assert command("predict", trained, table, tmp_path / "out.parquet", *flags).code == 0
        found = pl.read_parquet(tmp_path / "out.parquet").select("probability_bad", "probability_good").to_numpy()
        assert np.array_equal(found, expected)
    evaluated = command("evaluate", trained)
    assert "calibrated" in evaluated.err
    assert json.loads(evaluated.out)["test"] == summary_of(trained)["test"]


def test_a_trained_model_of_before_is_not_calibrated(trained: Path, tmp_path: Path) -> None:
    own, _ = own_and_calibrated(trained)
    parts = read_parts(trained / "model")
    del parts["calibration.json"], parts["model.json"]["config"]["calibration"]
    commit(tmp_path / "model", encode_parts(parts))
    model = dist_train.load(tmp_path / "model")
    assert not model.calibrated
    assert np.array_equal(model.predict_proba(pl.read_csv(trained.parent / "table.csv")), own)


def test_a_calibration_of_a_later_format_is_refused(trained: Path, tmp_path: Path) -> None:
    parts = read_parts(trained / "model")
    parts["calibration.json"]["format"] = 99
    commit(tmp_path / "model", encode_parts(parts))
    with pytest.raises(dist_train.UserError, match="calibration of format 99"):
        dist_train.load(tmp_path / "model")


def test_two_ranks_fit_the_same_bits_and_verify_notices_another_number(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained.parent / "table.csv", tmp_path)
    again = tiny_job(tmp_path / "table.csv", tmp_path / "run", *OVERFITTED, "data.weight=exposure")
    finish(again, 2)
    run = folder_of(again)
    assert summary_of(run)["calibration"] == summary_of(trained)["calibration"]
    assert summary_of(run)["test"] == summary_of(trained)["test"]
    assert command("verify", run).code == 0
    parts = read_parts(run / "model")
    parts["calibration.json"]["temperature"] += 1e-12
    shutil.rmtree(run / "model")
    commit(run / "model", encode_parts(parts))
    verified = command("verify", run)
    assert verified.code == 1
    assert "calibration.json is not what the replay has" in verified.err


@pytest.mark.parametrize("more", ["ensemble.seeds=2", "data.folds=2"])
def test_an_ensemble_has_one_of_its_own(tmp_path: Path, more: str) -> None:
    table = write_noise(tmp_path)
    assert run_job(tiny_job(table, tmp_path / "run", *OVERFITTED, more)).codes == [0]
    run = tmp_path / "run"
    summary = summary_of(run)
    assert summary["calibration"] == json.loads((run / "model" / "calibration.json").read_text())
    assert summary["calibration"]["fitted"]["rows"] == (340 if "folds" in more else 120)
    own, calibrated = own_and_calibrated(run)
    assert np.array_equal(calibration_from_json(summary["calibration"], "")(own), calibrated)
    assert dist_train.load(run).evaluate("test") == summary["test"]


def test_none_and_not_applied(tmp_path: Path) -> None:
    table = write_noise(tmp_path)
    for name, *more in (
        ("none", "calibration.method=none"),
        ("kept", "calibration.apply=false", "calibration.method=vector"),
    ):
        finish(tiny_job(table, tmp_path / name, *OVERFITTED, *more))
    assert summary_of(tmp_path / "none")["calibration"] is None
    assert "calibrated" not in summary_of(tmp_path / "none")["test"]
    assert not (tmp_path / "none" / "model" / "calibration.json").exists()
    own, default = own_and_calibrated(tmp_path / "kept")
    assert np.array_equal(own, default)
    rows = pl.read_csv(table)
    assert not np.array_equal(dist_train.load(tmp_path / "kept", calibrated=True).predict_proba(rows), own)
    digests = [summary_of(tmp_path / name)["weights_sha256"] for name in ("none", "kept")]
    assert digests[0] == digests[1]
