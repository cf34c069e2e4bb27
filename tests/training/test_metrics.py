"""Metrics against scikit-learn and torchmetrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sklearn.metrics as sk
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from dist_train.training.metrics import calibration_error, classification_metrics

Arrays = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


def scored(rows: int, classes: int, *, sharpness: float = 1.0, seed: int = 0) -> Arrays:
    """Probabilities that know something about their targets."""
    rng = np.random.default_rng([rows, classes, seed])
    targets = rng.integers(0, classes, rows)
    logits = sharpness * (rng.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[targets])
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True), targets


def names(classes: int) -> list[str]:
    return [f"class {i}" for i in range(classes)]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0])
def test_equal_to_scikit_learn(classes: int, sharpness: float) -> None:
    p, y = scored(500, classes, sharpness=sharpness)
    predicted = p.argmax(1)
    ours = classification_metrics(p, y, names(classes))
    auroc = sk.roc_auc_score(y, p[:, 1]) if classes == 2 else sk.roc_auc_score(y, p, multi_class="ovr", average="macro")
    expected = {
        "rows": 500,
        "loss": sk.log_loss(y, p),
        "accuracy": sk.accuracy_score(y, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(y, predicted),
        "macro_f1": sk.f1_score(y, predicted, average="macro"),
        "auroc": auroc,
        "brier": sk.brier_score_loss(y, p, labels=np.arange(classes)),
    }
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert ours["confusion_matrix"] == sk.confusion_matrix(y, predicted).tolist()
    report = sk.classification_report(y, predicted, target_names=names(classes), output_dict=True, zero_division=0.0)
    for name in names(classes):
        theirs = report[name]
        assert ours["per_class"][name] == pytest.approx(
            {
                "precision": theirs["precision"],
                "recall": theirs["recall"],
                "f1": theirs["f1-score"],
                "rows": theirs["support"],
            },
            abs=1e-9,
        )


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_equals_torchmetrics(classes: int, sharpness: float, num_bins: int) -> None:
    p, y = scored(500, classes, sharpness=sharpness)
    theirs = multiclass_calibration_error(
        torch.from_numpy(p), torch.from_numpy(y), num_classes=classes, n_bins=num_bins, norm="l1"
    )
    assert calibration_error(p, y, num_bins) == pytest.approx(theirs.item(), abs=1e-6)


def test_calibration_error_of_known_cases() -> None:
    sure, right = np.array([[1.0, 0.0]] * 4), np.array([0, 0, 0, 1])
    assert calibration_error(sure, right) == 0.25
    assert calibration_error(np.array([[0.75, 0.25]] * 4), right) == 0.0
    assert calibration_error(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])) == 0.0
    # 0.75 is the upper bound of the third bin of four, 0.8 is in the fourth: |1 - 0.75| / 2 + |0 - 0.8| / 2.
    edge = np.array([[0.75, 0.25], [0.8, 0.2]])
    assert calibration_error(edge, np.array([0, 1]), 4) == pytest.approx(0.525)
    assert calibration_error(edge, np.array([0, 1]), 1) == pytest.approx(0.275)


def is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(k) is str and is_json(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(is_json, value))
    return value is None or type(value) in (int, float, str)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_class_without_rows_has_no_auroc_and_everything_else(missing: int) -> None:
    p, y = scored(200, 3)
    p, y = p[y != missing], y[y != missing]
    ours = classification_metrics(p, y, names(3))
    assert ours["auroc"] is None
    assert is_json(ours)
    assert ours["per_class"][f"class {missing}"]["rows"] == 0
    assert ours["per_class"][f"class {missing}"]["recall"] == 0.0
    assert np.sum(ours["confusion_matrix"]) == len(y)
    assert ours["loss"] == pytest.approx(sk.log_loss(y, p, labels=[0, 1, 2]), abs=1e-9)
    recalls = [(p[y == c].argmax(1) == c).mean() for c in range(3) if c != missing]
    assert ours["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_one_row_and_one_class(classes: int) -> None:
    p, _ = scored(1, classes)
    ours = classification_metrics(p, np.zeros(1, dtype=np.int64), names(classes))
    assert ours["auroc"] is None
    assert is_json(ours)
    assert ours["rows"] == 1


def test_rows_that_are_certain_and_wrong_have_a_finite_loss() -> None:
    ours = classification_metrics(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 0]), names(2))
    assert np.isfinite(ours["loss"])
    assert (ours["accuracy"], ours["brier"], ours["ece"], ours["auroc"]) == (0.0, 1.0, 1.0, 0.0)


def test_brier_of_two_classes_is_the_squared_error_of_the_second_one() -> None:
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    y = np.array([0, 0, 1])
    brier = classification_metrics(p, y, names(2))["brier"]
    assert brier == pytest.approx(sk.brier_score_loss(y, p[:, 1]), abs=1e-15)
    assert brier == pytest.approx((0.01 + 0.36 + 0.04) / 3, abs=1e-15)
