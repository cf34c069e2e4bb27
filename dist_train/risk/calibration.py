"""Calibration: what turns a model's probabilities into those that the observed frequencies of validation rows support.

It works on probabilities, (rows, classes) float64, so it is the same for one model, for an ensemble whose probabilities
are averaged, and for every task. A row is computed apart from the others. scikit-learn and scipy fit the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_train.accel.defined_functions import exp, log, softmax
from dist_train.config.compatibility import FORMATS, require_format

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# A probability of 0 has no logarithm. scikit-learn's temperature adds as much to every probability.
SMALLEST = 1e-12
# scikit-learn's bounds of the logarithm of the inverse temperature.
_LOG_BETA = 10.0
# A parametric calibration is used where a likelihood-ratio test refutes, at this level, that none is needed.
SIGNIFICANCE = 0.05
# Rows that are predicted wrong and say how sure probabilities may be: with fewer, a temperature below 1 is not used.
FEWEST_WRONG = 30


class Calibration(Protocol):
    """Probabilities (rows, classes) float64 -> calibrated ones, of the same shape; the same array where none change."""

    def __call__(self, probabilities: Floats) -> Floats: ...

    def parameters(self) -> dict[str, Any]:
        """The parameters as JSON values."""


@dataclass(frozen=True)
class Temperature:
    """softmax(log p / temperature) (Guo et al. 2017, "On Calibration of Modern Neural Networks").

    The order of the classes of a row stays, so that the predicted class is the same. Above 1: less confident.
    """

    temperature: float

    def __call__(self, probabilities: Floats) -> Floats:
        if self.temperature == 1:
            return probabilities
        return softmax(_logits(probabilities) / self.temperature)

    def parameters(self) -> dict[str, Any]:
        """One number."""
        return {"temperature": self.temperature}


@dataclass(frozen=True)
class Vector:
    """softmax(scales * log p + biases), a scale and a bias for each class (Guo et al. 2017, vector scaling)."""

    scales: tuple[float, ...]
    biases: tuple[float, ...]

    def __call__(self, probabilities: Floats) -> Floats:
        if self == Vector((1.0,) * len(self.scales), (0.0,) * len(self.scales)):
            return probabilities
        return softmax(_logits(probabilities) * np.array(self.scales) + np.array(self.biases))

    def parameters(self) -> dict[str, Any]:
        """Two numbers for each class."""
        return {"scales": list(self.scales), "biases": list(self.biases)}


@dataclass(frozen=True)
class Isotonic:
    """A monotone function of each class's own probability, then divided by their sum (Zadrozny and Elkan 2002).

    `x` and `y` of a class are the corners of its function, which is linear between them and constant outside.
    """

    x: tuple[tuple[float, ...], ...]
    y: tuple[tuple[float, ...], ...]

    def __call__(self, probabilities: Floats) -> Floats:
        corners = zip(probabilities.T, self.x, self.y, strict=True)
        shares = np.stack([np.interp(column, x, y) for column, x, y in corners], axis=1)
        return np.asarray(shares / shares.sum(1, keepdims=True))

    def parameters(self) -> dict[str, Any]:
        """The corners."""
        return {"x": [list(x) for x in self.x], "y": [list(y) for y in self.y]}


@dataclass(frozen=True)
class Fitted:
    """A calibration and what it was fitted to: so many `rows`, of which `wrong` are predicted wrong.

    `p_value`: of the likelihood-ratio test against none, if there is one. `estimate`: the parameters of the highest
    likelihood. Unless they are `used`, the calibration leaves the probabilities as they are.
    """

    method: str
    calibration: Calibration
    estimate: Calibration
    rows: int
    wrong: int
    p_value: float | None = None
    used: bool = True

    def to_json(self) -> dict[str, Any]:
        """What `model/calibration.json` holds."""
        fitted = {"rows": self.rows, "wrong": self.wrong, "p_value": self.p_value, "used": self.used}
        return {
            "format": FORMATS["calibration"],
            "method": self.method,
            **self.calibration.parameters(),
            "fitted": fitted | {"estimate": self.estimate.parameters()},
        }


def calibration_from_json(content: Mapping[str, Any], source: str) -> Calibration:
    """The calibration in a `calibration.json`.

    Raises:
        UserError: its format is one that this version does not read.
    """
    require_format("calibration", content.get("format"), source)
    if content["method"] == "temperature":
        return Temperature(float(content["temperature"]))
    if content["method"] == "vector":
        return Vector(tuple(content["scales"]), tuple(content["biases"]))
    return Isotonic(tuple(map(tuple, content["x"])), tuple(map(tuple, content["y"])))


def fit_calibration(method: str, probabilities: Floats, targets: Integers, weights: Floats | None = None) -> Fitted:
    """A calibration fitted to rows: `temperature`, `vector` or `isotonic`.

    Probabilities (rows, classes), class indices (rows,), weights (rows,) at least 0 and not all 0; None: each counts 1.
    """
    if weights is not None:  # a row of weight 0 is no row
        kept = weights > 0
        probabilities, targets, weights = probabilities[kept], targets[kept], weights[kept]
    own = np.ones(len(targets)) if weights is None else weights
    wrong = int((probabilities.argmax(1) != targets).sum())
    if method == "isotonic":
        isotonic = _isotonic(probabilities, targets, own)
        return Fitted(method, isotonic, isotonic, len(targets), wrong)
    classes = probabilities.shape[1]
    fit, identity, degrees = _PARAMETRIC[method](classes)
    estimate = fit(_logits(probabilities), targets, own)
    gain = _log_loss(identity(probabilities), targets, own) - _log_loss(estimate(probabilities), targets, own)
    p_value = _p_value(gain, own, degrees)
    sharpens = isinstance(estimate, Temperature) and estimate.temperature < 1
    used = p_value < SIGNIFICANCE and not (sharpens and wrong < FEWEST_WRONG)
    return Fitted(method, estimate if used else identity, estimate, len(targets), wrong, p_value, used)


_Fit = Callable[[Floats, Integers, Floats], Calibration]


def _p_value(gain: float, weights: Floats, degrees: int) -> float:
    """Of the likelihood-ratio test (Wilks 1938); weighted rows count as Kish's effective number of them (1965)."""
    from scipy.stats import chi2

    rows = weights.sum() ** 2 / (weights**2).sum()
    return float(chi2.sf(2 * rows * max(0.0, gain), degrees))


def _temperature(logits: Floats, targets: Integers, weights: Floats) -> Temperature:
    """The temperature of the least log loss: where the derivative by its inverse, which never falls, is 0.

    1 where there is none within scikit-learn's bounds, as of rows that are all predicted right: their log loss falls
    with the temperature without end.
    """
    from scipy.optimize import brentq

    of_target = logits[np.arange(len(targets)), targets]

    def slope(log_beta: float) -> float:
        expected = (softmax(logits * exp(np.array(log_beta))) * logits).sum(1)
        return float((weights * (expected - of_target)).sum() / weights.sum())

    if slope(-_LOG_BETA) >= 0 or slope(_LOG_BETA) <= 0:
        return Temperature(1.0)
    log_beta = brentq(slope, -_LOG_BETA, _LOG_BETA, xtol=1e-14, rtol=1e-14)
    return Temperature(float(exp(np.array(-log_beta))))


def _vector(logits: Floats, targets: Integers, weights: Floats) -> Vector:
    """The scales and biases of the highest posterior density under a normal prior around (1, 0) of variance 1.

    The prior keeps the parameters of a class finite that no row has, and those of rows that can be told apart.
    """
    from scipy.optimize import minimize

    classes = logits.shape[1]
    hot = np.eye(classes)[targets]
    total = weights.sum()

    def loss(parameters: Floats) -> tuple[float, Floats]:
        scales, biases = parameters[:classes], parameters[classes:]
        predicted = softmax(logits * scales + biases)
        errors = weights[:, None] * (predicted - hot)
        distance = np.concatenate([scales - 1, biases])
        slopes = np.concatenate([(errors * logits).sum(0), errors.sum(0)]) + distance
        value = _log_loss(predicted, targets, weights) * total + (distance**2).sum() / 2
        return value / total, slopes / total

    start = np.concatenate([np.ones(classes), np.zeros(classes)])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10})
    return Vector(tuple(found.x[:classes].tolist()), tuple(found.x[classes:].tolist()))


def _isotonic(probabilities: Floats, targets: Integers, weights: Floats) -> Isotonic:
    corners = [_isotonic_of(probabilities[:, k], targets == k, weights) for k in range(probabilities.shape[1])]
    return Isotonic(tuple(x for x, _ in corners), tuple(y for _, y in corners))


def _isotonic_of(
    scores: Floats, positive: npt.NDArray[np.bool_], weights: Floats
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The corners of one class's function; the identity's where no row, or each, is of the class.

    The frequency of a step is that of its rows and of one more row, of the frequency of the class in all rows: steps of
    few rows would say 0 or 1, whose log loss is infinite where a later row is otherwise. Then it is fitted once more.
    """
    from sklearn.isotonic import IsotonicRegression

    base = float((weights * positive).sum() / weights.sum())
    if not 0 < base < 1:
        return (0.0, 1.0), (SMALLEST, 1.0)
    fitted = IsotonicRegression(y_min=0, y_max=1).fit(scores, positive.astype(float), weights).predict(scores)
    _, step = np.unique(fitted, return_inverse=True)
    of_steps = np.bincount(step, weights)[step] * len(weights) / weights.sum()
    smoothed = (fitted * of_steps + base) / (of_steps + 1)
    again = IsotonicRegression(y_min=0, y_max=1).fit(scores, smoothed, weights)
    return tuple(again.X_thresholds_.tolist()), tuple(again.y_thresholds_.tolist())


def _scaling_of_all(_classes: int) -> tuple[_Fit, Calibration, int]:
    return _temperature, Temperature(1.0), 1


def _scaling_of_each(classes: int) -> tuple[_Fit, Calibration, int]:
    """A bias that all classes share changes nothing: one parameter less."""
    return _vector, Vector((1.0,) * classes, (0.0,) * classes), 2 * classes - 1


_PARAMETRIC: dict[str, Callable[[int], tuple[_Fit, Calibration, int]]] = {
    "temperature": _scaling_of_all,
    "vector": _scaling_of_each,
}
"""Method -> how it is fitted, the calibration that changes nothing, and its free parameters."""


def _logits(probabilities: Floats) -> Floats:
    return log(probabilities + SMALLEST)


def _log_loss(probabilities: Floats, targets: Integers, weights: Floats) -> float:
    own = np.maximum(probabilities[np.arange(len(targets)), targets], np.finfo(np.float64).tiny)
    return float(-(weights * log(own)).sum() / weights.sum())
