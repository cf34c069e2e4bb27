"""How good probabilities are: scikit-learn's definitions, in float64, on all rows at once."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dist_train.errors import UserError
from dist_train.plugins import Registry

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NUM_CALIBRATION_BINS = 15

Metric = Callable[..., Any]
"""Probabilities, (rows, classes), class indices, (rows,), and class names -> a number, or another JSON value.

One that has a parameter `weights` gets the weights of the rows, (rows,) float64, or None where every row counts 1.
"""
_AnyMetric = TypeVar("_AnyMetric", bound=Metric)

_DIRECTIONS: dict[str, bool] = {}
"""Registered metric -> whether higher is better, where that was said."""
_METRICS: Registry[Metric] = Registry("metric", "evaluation.metrics", "dist_train.metrics", {})
# Names in a line of metrics.jsonl that a registered metric cannot have.
_TAKEN = frozenset((
    "step", "epoch", "samples", "split", "learning_rate", "grad_norm", "samples_per_second", "rows", "loss", "accuracy",
    "balanced_accuracy", "macro_f1", "auroc", "brier", "ece", "per_class", "confusion_matrix", "weight", "objective",
))  # fmt: skip


def register_metric(name: str, *, higher_is_better: bool | None = None) -> Callable[[_AnyMetric], _AnyMetric]:
    """Decorator that makes a function the metric `name`, for `evaluation.metrics=[<name>]`.

    The function gets the probabilities of all rows of a split, (rows, classes) float64, their class indices, (rows,)
    int64, and the class names in the order of the columns; all of them in numpy, on rank 0. It returns a number, or
    another JSON value; None where the metric is not defined. A NaN and an infinite number become None. A function with
    a parameter named `weights` gets the weights of the rows (`data.weight`), (rows,) float64, or None; one without
    counts every row alike. `higher_is_better` lets `train.select_by` name the metric.

        >>> from dist_train import register_metric
        >>> @register_metric("worst_case")
        ... def worst_case(probabilities, targets, class_names):
        ...     return 1 - probabilities[range(len(targets)), targets].min()

    Raises:
        ValueError: the name is empty, or that of a metric or number that a line of metrics.jsonl has anyway.
    """
    if name in _TAKEN:
        raise ValueError(f"{name!r} cannot name a metric: a line of metrics.jsonl has it anyway")

    def register(metric: _AnyMetric) -> _AnyMetric:
        _METRICS.register(name, metric)
        _DIRECTIONS.pop(name, None)
        if higher_is_better is not None:
            _DIRECTIONS[name] = higher_is_better
        return metric

    return register


def check_metrics(names: Iterable[str]) -> None:
    """Find every metric of `evaluation.metrics`.

    Raises:
        UserError: there is no such metric.
    """
    for name in names:
        _METRICS.find(name)


def direction_of(name: str) -> bool:
    """Whether a higher value of a registered metric is better.

    Raises:
        UserError: there is no such metric, or its direction was not said.
    """
    _METRICS.find(name)
    if name not in _DIRECTIONS:
        raise UserError(
            f"train.select_by: the metric {name!r} has no direction: register_metric({name!r}, higher_is_better=...)"
        )
    return _DIRECTIONS[name]


def is_metric(name: str) -> bool:
    """Whether `evaluation.metrics` may name it."""
    return name in _METRICS.names()


def unweighted_metrics(names: Iterable[str]) -> list[str]:
    """Those of the registered metrics that do not take the weights of rows."""
    return [name for name in names if not _takes_weights(_METRICS.find(name))]


def _takes_weights(metric: Metric) -> bool:
    try:
        return "weights" in inspect.signature(metric).parameters
    except ValueError:  # a function of a C extension
        return False


def registered_metrics(
    names: Iterable[str],
    probabilities: Floats,
    targets: Integers,
    class_names: Sequence[str],
    weights: Floats | None = None,
) -> dict[str, Any]:
    """The metrics of `evaluation.metrics`, as JSON types.

    Raises:
        UserError: there is no such metric, it raised an exception, or what it returned is no JSON value.
    """
    values = {}
    for name in names:
        metric = _METRICS.find(name)
        rows = (_read_only(probabilities), _read_only(targets), list(class_names))  # the next metric gets them too
        extra = {"weights": None if weights is None else _read_only(weights)} if _takes_weights(metric) else {}
        values[name] = _value(name, partial(metric, *rows, **extra))
    return values


def _value(name: str, metric: Callable[[], Any]) -> Any:
    try:
        value = metric()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"evaluation.metrics: the metric {name!r} failed: {reason}") from error
    value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"evaluation.metrics: the metric {name!r} gave no JSON value: {error}") from None
    return value


def classification_metrics(
    probabilities: Floats,
    targets: Integers,
    class_names: Sequence[str],
    weights: Floats | None = None,
    *,
    log: Callable[[Floats], Floats] = np.log,
) -> dict[str, Any]:
    """Metrics of `probabilities` (rows, classes) against class indices `targets` (rows,), as JSON types.

    A metric that is not defined on these rows is None: AUROC when a class does not occur or is the only one.
    `loss` is the log loss in nats, by the logarithm `log`. `brier` (Brier 1950) is the mean over rows of the squared
    error of the second class's probability where there are two classes, else of the sum over classes. `ece` is the
    expected calibration error of the top class. `confusion_matrix[i][j]` counts rows of class i predicted as j.

    With `weights`, (rows,) at least 0 and not all 0, every metric is scikit-learn's of that `sample_weight`: a row of
    weight 2 counts as two rows. `rows` are then still counted, `weight` is the sum of the weights, and
    `confusion_matrix` has sums of weights.
    """
    # Imported here: scikit-learn takes a second to load, and training must not wait for it before its first step.
    from sklearn import metrics as sk

    classes = np.arange(len(class_names))
    counts = np.bincount(targets, minlength=len(classes))
    if weights is not None:  # scikit-learn takes a class whose rows all have weight 0 for one that occurs
        kept = weights > 0
        probabilities, targets, weights = probabilities[kept], targets[kept], weights[kept]
    predicted = probabilities.argmax(1)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        targets, predicted, labels=classes, average=None, zero_division=0.0, sample_weight=weights
    )
    present = support > 0
    per_class = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for name, p, r, f, n in zip(class_names, precision, recall, f1, counts, strict=True)
    }
    matrix = sk.confusion_matrix(targets, predicted, labels=classes, sample_weight=weights)
    metrics = {
        "rows": int(counts.sum()),
        "loss": _log_loss(probabilities, targets, weights, log),
        "accuracy": float(sk.accuracy_score(targets, predicted, sample_weight=weights)),
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1.mean()),
        "auroc": _macro_auroc(probabilities, targets, classes, weights),
        "brier": _brier(probabilities, targets, weights),
        "ece": calibration_error(probabilities, targets, weights=weights),
        "per_class": per_class,
        "confusion_matrix": matrix.tolist(),
    }
    if weights is not None:
        metrics["weight"] = float(weights.sum())
        for name, weight in zip(class_names, support, strict=True):
            per_class[name]["weight"] = float(weight)
    return metrics


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def calibration_error(
    probabilities: Floats, targets: Integers, num_bins: int = NUM_CALIBRATION_BINS, weights: Floats | None = None
) -> float:
    """Expected calibration error of the predicted class over equal-width bins (Guo et al. 2017), from 0 to 1.

    scikit-learn has none, and torchmetrics' rounds to float32. A bin holds its upper bound and not its lower one, as in
    the paper; torchmetrics has it the other way round, which only a confidence on the very edge can tell.
    """
    confidence = probabilities.max(1)
    gap = confidence - (probabilities.argmax(1) == targets)
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    sums = np.bincount(bins, weights=gap if weights is None else gap * weights, minlength=num_bins)
    return float(np.abs(sums).sum() / (len(targets) if weights is None else weights.sum()))


def _log_loss(
    probabilities: Floats, targets: Integers, weights: Floats | None, log: Callable[[Floats], Floats]
) -> float:
    """scikit-learn's, with a logarithm of the caller's."""
    smallest = np.finfo(probabilities.dtype).eps
    losses = -log(np.clip(probabilities[np.arange(len(targets)), targets], smallest, 1 - smallest))
    return float(np.average(losses, weights=weights))


def _macro_auroc(probabilities: Floats, targets: Integers, classes: Integers, weights: Floats | None) -> float | None:
    from sklearn.metrics import roc_auc_score

    if len(np.unique(targets)) < len(classes):
        return None
    if len(classes) == 2:
        return float(roc_auc_score(targets, probabilities[:, 1], sample_weight=weights))
    return float(
        roc_auc_score(targets, probabilities, multi_class="ovr", average="macro", labels=classes, sample_weight=weights)
    )


def _brier(probabilities: Floats, targets: Integers, weights: Floats | None) -> float:
    errors = probabilities.copy()
    errors[np.arange(len(targets)), targets] -= 1
    of_rows = (errors**2).sum(1)
    total = float(of_rows.mean() if weights is None else np.average(of_rows, weights=weights))
    return total / 2 if probabilities.shape[1] == 2 else total
