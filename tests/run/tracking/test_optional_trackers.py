"""One contract of the trackers that a key turns on: TensorBoard, MLflow, curves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.run.tracking.curves_tracker import CurvesTracker
from dist_train.run.tracking.mlflow_tracker import MlflowTracker
from dist_train.run.tracking.tensorboard_tracker import TensorBoardTracker

LINE = {"step": 5, "split": "valid", "loss": 0.5, "auroc": 0.75, "per_class": {"a": {}}, "selected_by": "loss"}
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other projects' imports


def mlflow_tracker(folder: Path, *, enabled: bool, last_step: int = 0) -> MlflowTracker:
    config = {"train": {"epochs": 3}, "data": {"drop": []}}
    return MlflowTracker(
        folder=folder, name="run", project="p", enabled=enabled, config=config, last_step=last_step
    )  # fmt: skip


MAKERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "tensorboard": (
        "torch.utils.tensorboard",
        lambda folder, enabled: TensorBoardTracker(folder=folder, enabled=enabled, start_step=0),
    ),
    "mlflow": ("mlflow.tracking", lambda folder, enabled: mlflow_tracker(folder, enabled=enabled)),
    "matplotlib": (
        "matplotlib.figure",
        lambda folder, enabled: CurvesTracker(metrics_file=folder / "metrics.jsonl", enabled=enabled),
    ),
}


@pytest.mark.parametrize("package", MAKERS)
def test_turned_off_it_writes_nothing_and_without_its_package_it_says_so_once(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, make = MAKERS[package]
    make(tmp_path, False).log(LINE)
    monkeypatch.setitem(sys.modules, module, None)
    tracker = make(tmp_path, True)
    tracker.log(LINE)
    tracker.log(LINE | {"step": 6})
    assert caplog.text.count(f"{package} is not installed") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", MAKERS)
def test_a_failure_is_one_warning(package: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip(package)
    for name in ("tensorboard", "mlflow.json", "curves.png"):
        (tmp_path / name).write_text("a file in its place") if name != "curves.png" else (tmp_path / name).mkdir()
    tracker = MAKERS[package][1](tmp_path, True)
    tracker.log(LINE)
    tracker.log(LINE | {"step": 6})
    assert caplog.text.count("training goes on without it") == 1


def test_mlflow_has_every_number_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    first = mlflow_tracker(tmp_path, enabled=True)
    first.log(LINE)
    first.log(LINE | {"step": 10, "loss": 0.4})
    first.close(failed=True)
    second = mlflow_tracker(tmp_path, enabled=True, last_step=10)
    second.log(LINE | {"step": 10, "loss": 0.3})  # trained again
    second.log(LINE | {"step": 15, "loss": 0.2})
    second.log_summary({"steps": 15, "test": {"loss": 0.6, "per_class": {}}, "weights_sha256": "abc"})
    second.close()
    second.close()
    client = tracking.MlflowClient()
    run = client.get_run(json.loads((tmp_path / "mlflow.json").read_bytes())["run_id"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params == {"train.epochs": "3", "data.drop": "[]"}
    assert run.data.tags["weights_sha256"] == "abc"
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "valid/loss")]
    assert losses == [(5, 0.5), (10, 0.4), (15, 0.2)]
    assert run.data.metrics["test/loss"] == 0.6


def test_curves_are_drawn_of_all_lines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    tracker = CurvesTracker(metrics_file=tmp_path / "metrics.jsonl", enabled=True)
    tracker.log({"step": 9, "split": "train", "loss": 0.4})
    assert not (tmp_path / "curves.png").exists()
    tracker.log(LINE | {"step": 10})
    first = (tmp_path / "curves.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    tracker.log(LINE | {"step": 15, "loss": 0.1})
    assert (tmp_path / "curves.png").read_bytes() != first
