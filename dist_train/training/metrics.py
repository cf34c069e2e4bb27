"""How good probabilities are: scikit-learn's definitions, in float64, on all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NUM_CALIBRATION_BINS = 15


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
