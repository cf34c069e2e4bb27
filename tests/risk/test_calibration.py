"""Calibration of probabilities, against scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import log_loss

from dist_train.errors import UserError
from dist_train.risk.calibration import Temperature, Vector, calibration_from_json, fit_calibration

Arrays = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


def overconfident(rows: int, classes: int, *, factor: float = 2.0, seed: int = 0) -> Arrays:
    """Probabilities whose logits are `factor` times those that the classes were drawn by."""
    rng = np.random.default_rng([rows, classes, seed])
    logits = rng.normal(size=(rows, classes)) * 1.5
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = (rng.random((rows, 1)) > true.cumsum(1)).sum(1)
    said = np.exp(logits * factor)
    return said / said.sum(1, keepdims=True), targets


class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """An estimator whose features are its probabilities."""

    def fit(self, _x: object, y: npt.NDArray[np.int64]) -> Given:
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return x

    def predict(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return x.argmax(1)


@pytest.mark.filterwarnings("ignore:Since FrozenEstimator does not appear to accept sample_weight")
@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_temperature_is_scikit_learns(classes: int, weighted: bool) -> None:
    p, y = overconfident(3000, classes)
    weights = np.random.default_rng(1).integers(0, 4, len(y)).astype(float) if weighted else None
    theirs = CalibratedClassifierCV(FrozenEstimator(Given().fit(p, y)), method="temperature")
    if weights is None:
        theirs.fit(p, y)
    else:
        theirs.fit(p[weights > 0], y[weights > 0], weights[weights > 0])
    beta = theirs.calibrated_classifiers_[0].calibrators[0].beta_
    ours = fit_calibration("temperature", p, y, weights)
    assert isinstance(ours.calibration, Temperature)
    assert ours.calibration.temperature == pytest.approx(1 / beta, rel=1e-6)
    assert ours.calibration(p) == pytest.approx(theirs.predict_proba(p), abs=1e-6)
    assert ours.calibration.temperature == pytest.approx(2, rel=0.2)
    assert ours.p_value is not None
    assert ours.p_value < 1e-6


@pytest.mark.parametrize("method", ["temperature", "vector", "isotonic"])
@pytest.mark.parametrize("classes", [2, 4])
def test_other_rows_are_better_and_a_file_says_the_same(method: str, classes: int) -> None:
    p, y = overconfident(4000, classes)
    fitted = fit_calibration(method, p[:3000], y[:3000])
    after = fitted.calibration(p[3000:])
    assert log_loss(y[3000:], after) < log_loss(y[3000:], p[3000:])
    assert after.sum(1) == pytest.approx(np.ones(1000))
    again = calibration_from_json(json.loads(json.dumps(fitted.to_json())), "calibration.json")
    assert np.array_equal(again(p[3000:]), after)


@pytest.mark.parametrize("method", ["temperature", "vector", "isotonic"])
def test_a_row_of_weight_two_counts_as_two_rows(method: str) -> None:
    p, y = overconfident(600, 3)
    weights = np.arange(600) % 3
    of_weights = fit_calibration(method, p, y, weights.astype(float))
    of_rows = fit_calibration(method, np.repeat(p, weights, axis=0), np.repeat(y, weights))
    if method == "isotonic":  # smoothing counts rows, and so does Kish's number in the other two
        assert of_weights.calibration(p) == pytest.approx(of_rows.calibration(p), abs=0.02)
    else:
        assert of_weights.estimate(p) == pytest.approx(of_rows.estimate(p), abs=1e-6)


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_probabilities_that_need_no_calibration_stay(method: str) -> None:
    p, y = overconfident(500, 3, factor=1.0)
    fitted = fit_calibration(method, p, y)
    assert fitted.p_value is not None
    assert fitted.p_value > 0.05
    assert np.array_equal(fitted.calibration(p), p)
    assert fitted.estimate.parameters() != fitted.calibration.parameters()


@pytest.mark.parametrize("method", ["temperature", "vector", "isotonic"])
def test_rows_that_are_all_right_and_a_class_without_rows(method: str) -> None:
    y = np.array([0, 1] * 20)
    p = np.full((40, 3), 0.05)
    p[np.arange(40), y] = 0.9
    after = fit_calibration(method, p, y).calibration(np.array([[0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    assert (after > 1e-4).all()  # of a later row that is otherwise the log loss stays small


@pytest.mark.parametrize(("rows", "wrong", "used"), [(400, 4, False), (4000, 40, True)])
def test_few_wrong_rows_do_not_make_probabilities_surer(rows: int, wrong: int, used: bool) -> None:
    """How sure they may be is known from the rows that are wrong; the likelihood-ratio test does not see how few."""
    y = np.arange(rows) % 3
    p = np.full((rows, 3), 0.05)
    p[np.arange(rows), np.where(np.arange(rows) < wrong, (y + 1) % 3, y)] = 0.9
    fitted = fit_calibration("temperature", p, y)
    assert fitted.p_value is not None
    assert fitted.p_value < 0.01
    assert fitted.estimate.parameters()["temperature"] < 0.8
    assert fitted.wrong == wrong
    assert fitted.used == used
    assert np.array_equal(fitted.calibration(p), p) != used


def test_a_bias_of_a_class_is_found() -> None:
    p, y = overconfident(20_000, 3, factor=1.0)
    tilted = p * [1.0, 3.0, 1.0]
    tilted /= tilted.sum(1, keepdims=True)
    fitted = fit_calibration("vector", tilted, y)
    assert isinstance(fitted.calibration, Vector)
    assert fitted.calibration.biases[1] - fitted.calibration.biases[0] == pytest.approx(-np.log(3), abs=0.15)


def test_another_format_is_refused() -> None:
    with pytest.raises(UserError, match="calibration of format 99"):
        calibration_from_json({"format": 99, "method": "temperature", "temperature": 1.0}, "model/calibration.json")
