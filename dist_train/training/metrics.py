"""How good probabilities are: scikit-learn's definitions, in float64, on all rows at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dist_train.errors import UserError
from dist_train.plugins import Registry

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NUM_CALIBRATION_BINS = 15

Metric = Callable[[Floats, Integers, Sequence[str]], Any]
"""Probabilities, (rows, classes), class indices, (rows,), and class names -> a number, or another JSON value."""
_AnyMetric = TypeVar("_AnyMetric", bound=Metric)

_METRICS: Registry[Metric] = Registry("metric", "evaluation.metrics", "dist_train.metrics", {})
# Names in a line of metrics.jsonl that a registered metric cannot have.
_TAKEN = frozenset((
    "step", "epoch", "samples", "split", "learning_rate", "grad_norm", "samples_per_second", "rows", "loss", "accuracy",
    "balanced_accuracy", "macro_f1", "auroc", "brier", "ece", "per_class", "confusion_matrix",
))  # fmt: skip


def register_metric(name: str) -> Callable[[_AnyMetric], _AnyMetric]:
    """Decorator that makes a function the metric `name`, for `evaluation.metrics=[<name>]`.

    The function gets the probabilities of all rows of a split, (rows, classes) float64, their class indices, (rows,)
    int64, and the class names in the order of the columns; all of them in numpy, on rank 0. It returns a number, or
    another JSON value; None where the metric is not defined. A NaN and an infinite number become None.

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
        return metric

    return register


def check_metrics(names: Iterable[str]) -> None:
    """Find every metric of `evaluation.metrics`.

    Raises:
        UserError: there is no such metric.
    """
    for name in names:
        _METRICS.find(name)


def is_metric(name: str) -> bool:
    """Whether `evaluation.metrics` may name it."""
    return name in _METRICS.names()


def registered_metrics(
    names: Iterable[str], probabilities: Floats, targets: Integers, class_names: Sequence[str]
) -> dict[str, Any]:
    """The metrics of `evaluation.metrics`, as JSON types.

    Raises:
        UserError: there is no such metric, it raised an exception, or what it returned is no JSON value.
    """
    return {name: _value(name, _METRICS.find(name), probabilities, targets, class_names) for name in names}


def _value(name: str, metric: Metric, probabilities: Floats, targets: Integers, class_names: Sequence[str]) -> Any:
    probabilities, targets = _read_only(probabilities), _read_only(targets)  # the next metric gets them too
    try:
        value = metric(probabilities, targets, list(class_names))
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


def classification_metrics(probabilities: Floats, targets: Integers, class_names: Sequence[str]) -> dict[str, Any]:
    """Metrics of `probabilities` (rows, classes) against class indices `targets` (rows,), as JSON types.

    A metric that is not defined on these rows is None: AUROC when a class does not occur or is the only one.
    `loss` is the log loss in nats. `brier` (Brier 1950) is the mean over rows of the squared error of the second
    class's probability where there are two classes, else of the sum over classes. `ece` is the expected calibration
    error of the top class. `confusion_matrix[i][j]` counts rows of class i predicted as j.
    """
    # Imported here: scikit-learn takes a second to load, and training must not wait for it before its first step.
    from sklearn import metrics as sk

    classes = np.arange(len(class_names))
    predicted = probabilities.argmax(1)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        targets, predicted, labels=classes, average=None, zero_division=0.0
    )
    present = support > 0
    return {
        "rows": len(targets),
        "loss": float(sk.log_loss(targets, probabilities, labels=classes)),
        "accuracy": float(sk.accuracy_score(targets, predicted)),
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1.mean()),
        "auroc": _macro_auroc(probabilities, targets, classes),
        "brier": _brier(probabilities, targets),
        "ece": calibration_error(probabilities, targets),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for name, p, r, f, n in zip(class_names, precision, recall, f1, support, strict=True)
        },
        "confusion_matrix": sk.confusion_matrix(targets, predicted, labels=classes).tolist(),
    }


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def calibration_error(probabilities: Floats, targets: Integers, num_bins: int = NUM_CALIBRATION_BINS) -> float:
    """Expected calibration error of the predicted class over equal-width bins (Guo et al. 2017), from 0 to 1.

    scikit-learn has none, and torchmetrics' rounds to float32. A bin holds its upper bound and not its lower one, as in
    the paper; torchmetrics has it the other way round, which only a confidence on the very edge can tell.
    """
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == targets
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(targets))


def _macro_auroc(probabilities: Floats, targets: Integers, classes: Integers) -> float | None:
    from sklearn.metrics import roc_auc_score

    if len(np.unique(targets)) < len(classes):
        return None
    if len(classes) == 2:
        return float(roc_auc_score(targets, probabilities[:, 1]))
    return float(roc_auc_score(targets, probabilities, multi_class="ovr", average="macro", labels=classes))


def _brier(probabilities: Floats, targets: Integers) -> float:
    errors = probabilities.copy()
    errors[np.arange(len(targets)), targets] -= 1
    total = float((errors**2).sum(1).mean())
    return total / 2 if probabilities.shape[1] == 2 else total
