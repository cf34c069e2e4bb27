"""What chooses the weights that are shipped: the loss that is trained, or the metric of train.select_by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss

from dist_train import UserError, register_loss, register_metric
from dist_train.config.load import load_config
from dist_train.config.schema import TrainConfig
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task
from dist_train.training.selection import Selection
from tests.api.tables import loans, quick
from tests.ranks import on_ranks

EVERY_EPOCH = "evaluation.every_steps=null"


def lines(run_dir: Path, split: str = "valid") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def fitted(run_dir: Path, *overrides: str, epochs: int = 8) -> dict[str, Any]:
    summary = quick(epochs=epochs, run_dir=run_dir, overrides=[EVERY_EPOCH, *overrides]).fit(*loans(400)).summary_
    return dict(summary)


def test_class_weights_choose_by_the_weighted_loss(tmp_path: Path) -> None:
    summary = fitted(tmp_path / "run", "train.class_weights={high: 5, low: 1, medium: 0.2}", "optim.lr=0.1")
    values = [line["objective"] for line in lines(tmp_path / "run")]
    steps = [line["step"] for line in lines(tmp_path / "run")]
    assert summary["selected_by"] == "objective"
    assert summary["best_step"] == steps[int(np.argmin(values))]
    assert summary["valid"]["objective"] == min(values)
    assert all(abs(line["objective"] - line["loss"]) > 1e-6 for line in lines(tmp_path / "run"))


def test_a_job_without_weights_has_no_other_metric(tmp_path: Path) -> None:
    summary = fitted(tmp_path / "run", "train.label_smoothing=0.1", epochs=1)
    assert summary["selected_by"] == "loss"
    assert "objective" not in summary["valid"]


def task_of(*arguments: str) -> Any:
    config = load_config(["data.target=risk_tier", "data.split_column=split", *arguments])
    return load_task(config, Collectives(World()))


def test_the_objective_is_scikit_learns_log_loss_of_class_and_row_weights() -> None:
    task = task_of("train.class_weights={high: 5, low: 1, medium: 0.2}", "train.label_smoothing=0.1")
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), size=50)
    y, weights = rng.integers(0, 3, 50), rng.random(50)
    found = task.metrics(torch.from_numpy(p), torch.from_numpy(y), torch.from_numpy(weights))
    by_class = np.array([{"high": 5, "low": 1, "medium": 0.2}[name] for name in task.class_names])
    expected = log_loss(y, p, labels=[0, 1, 2], sample_weight=weights * by_class[y])
    assert found["objective"] == pytest.approx(expected, rel=1e-5)


def test_a_registered_loss_chooses(tmp_path: Path) -> None:
    @register_loss("squares")
    def squares(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (logits.softmax(1) - F.one_hot(targets, logits.shape[1])).square().sum(1)

    summary = fitted(tmp_path / "run", "train.loss=squares", epochs=3)
    assert summary["selected_by"] == "objective"
    for line in lines(tmp_path / "run"):
        assert line["objective"] == pytest.approx(line["brier"], rel=1e-5)


@pytest.mark.parametrize(("metric", "choose"), [("auroc", np.argmax), ("brier", np.argmin), ("mine", np.argmax)])
def test_a_metric_by_name_chooses_in_its_direction(metric: str, choose: Any, tmp_path: Path) -> None:
    register_metric("mine", higher_is_better=True)(lambda p, y, _names: float(p[range(len(y)), y].mean()))
    summary = fitted(
        tmp_path / "run", f"train.select_by={metric}", "evaluation.metrics=[mine]", "optim.lr=0.1", "train.epochs=6"
    )
    found = lines(tmp_path / "run")
    assert summary["best_step"] == found[int(choose([line[metric] for line in found]))]["step"]
    assert summary["selected_by"] == metric


def test_mistakes_in_what_chooses() -> None:
    with pytest.raises(UserError, match=r"train\.select_by: there is no metric 'recall'; there is loss, objective,"):
        load_config(["train.select_by=recall"])
    register_metric("aimless")(lambda *_: 0.5)
    with pytest.raises(UserError, match=r"the metric 'aimless' has no direction: register_metric\('aimless', higher"):
        Selection.of(TrainConfig(select_by="aimless"))
    with pytest.raises(UserError, match="ends the run before the learning rate is reduced"):
        load_config(["schedule.name=plateau", "train.early_stopping_patience=3"])


@pytest.mark.parametrize(
    "argument", ["train.early_stopping_patience=2", "train.select_by=auroc", "schedule.name=plateau"]
)
def test_deciding_without_validation_rows_is_refused(argument: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no validation rows to decide by"):
        quick(validation_fraction=0.0, run_dir=tmp_path / "run", overrides=[argument]).fit(*loans())
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_early_best_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = quick(epochs=30, run_dir=tmp_path / "run", overrides=[EVERY_EPOCH, "optim.lr=0.3"], verbose=True)
    summary = classifier.fit(*loans(60)).summary_
    values = [line["loss"] for line in lines(tmp_path / "run")]
    early = 2 * summary["best_step"] <= summary["steps"] and len(values) - 1 - int(np.argmin(values)) >= 3
    said = [line for line in capsys.readouterr().err.splitlines() if "overfits" in line]
    assert len(said) == early
    assert not early or f"that of step {summary['best_step']} of {summary['steps']} (epoch" in said[0]


def plateau(collectives: Collectives) -> list[float]:
    """Rates of a session whose validation stands still, interrupted and restored on the way."""
    arguments = [
        "data.target=risk_tier", "data.split_column=split", "schedule.name=plateau", "schedule.plateau_patience=2",
        "schedule.warmup_steps=2", "optim.lr=1.0", "runtime.device=cpu",
    ]  # fmt: skip
    config = load_config(arguments)
    task = load_task(config, collectives)
    session, rates = Session(config, task, collectives), []
    for step in range(6):
        rates.append(session.learning_rate(step))
        session.progress.note_validation(1.0)
        if step == 3:
            parts = session.tensor_parts() | {"state.json": {"progress": session.progress.state_dict()}}
            session = Session(config, task, collectives)
            session.restore(parts)
    return rates


def test_a_plateau_is_resumed_where_it_stood() -> None:
    assert on_ranks(1, plateau)[0] == pytest.approx([0.5, 1.0, 1.0, 0.3, 0.3, 0.09])
