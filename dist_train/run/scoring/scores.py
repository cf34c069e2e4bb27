"""Scores of a trained model: of its own probabilities, and beside them of the calibrated ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.risk.calibration import calibration_from_json, fit_calibration
from dist_train.run.checkpoint.trained_model import CALIBRATION
from dist_train.system.console import log
from dist_train.tasks.base import Task
from dist_train.training.evaluation import probabilities, scores
from dist_train.training.protocols import Rows, Scorer

Calibrated = dict[str, Any]
"""Content of `model/calibration.json`."""
Scores = dict[str, dict[str, Any] | None]
"""Split -> metrics, with those of the calibrated probabilities under `calibrated`; None where there are no rows."""


def score_splits(
    model: nn.Module, task: Task, config: JobConfig, collectives: Collectives
) -> tuple[Scores, Calibrated | None]:
    """Metrics on the validation and the test rows, and the calibration fitted to the former; the same on every rank.

    TrainingFault on every rank when probabilities are not finite.
    """
    found: Scores = {}
    calibration = None
    for split in ("valid", "test"):
        rows = task.splits[split]
        if not len(rows):
            found[split] = None
            continue
        with collectives.heartbeat.phase("evaluation"):
            predicted = probabilities(model, rows, config.evaluation.batch_size, task, collectives)
            metrics = scores(predicted, rows, task, collectives)
            if split == "valid":
                calibration = _fitted_on_rank_zero(config, predicted, rows, collectives)
            found[split] = metrics | calibrated_scores(calibration, predicted, rows, task, collectives)
    return found, calibration


def _fitted_on_rank_zero(
    config: JobConfig, predicted: Tensor | None, rows: Rows, collectives: Collectives
) -> Calibrated | None:
    return collectives.on_rank_zero(lambda: fitted(config, predicted, rows.targets, rows.weights))


def fitted(config: JobConfig, predicted: Tensor | None, targets: Tensor, weights: Tensor | None) -> Calibrated | None:
    """Rank 0: the calibration of `calibration.method`, fitted to the probabilities of validation rows; None: none."""
    if config.calibration.method == "none" or not len(targets):
        return None
    assert predicted is not None  # on rank 0
    of_rows = None if weights is None else weights.cpu().double().numpy()
    return fit_calibration(config.calibration.method, predicted.numpy(), targets.cpu().numpy(), of_rows).to_json()


def calibrated(calibration: Mapping[str, Any], predicted: Tensor) -> Tensor:
    """Calibrated probabilities, (rows, classes) float64."""
    return torch.from_numpy(calibration_from_json(calibration, CALIBRATION)(predicted.numpy()))


def calibrated_scores(
    calibration: Calibrated | None, predicted: Tensor | None, rows: Rows, scorer: Scorer, collectives: Collectives
) -> dict[str, Any]:
    """`calibrated`: the metrics of calibrated probabilities, the same on every rank; empty without a calibration."""
    if calibration is None:
        return {}
    after = None if predicted is None else calibrated(calibration, predicted)
    return {"calibrated": scores(after, rows, scorer, collectives)}


def note_calibration(summary: Mapping[str, Any]) -> None:
    """Say what the calibration of a summary does to log loss and calibration error."""
    calibration = summary["calibration"]
    if calibration is None:
        return
    found = calibration["fitted"]
    if not found["used"]:
        log.info(
            "calibration: none is made: %d validation rows, %d of them predicted wrong, do not say enough (p = %.2g)",
            found["rows"], found["wrong"], found["p_value"],
        )  # fmt: skip
        return
    for split in ("valid", "test"):
        before, after = summary[split] or {}, (summary[split] or {}).get("calibrated", {})
        changes = [f"{name} {after[name]:.4f} (was {before[name]:.4f})" for name in ("loss", "ece") if name in after]
        if changes:
            log.info("%s  calibrated (%s): %s", split, calibration["method"], "  ".join(changes))
