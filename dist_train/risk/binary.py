"""How well probabilities of one class tell its rows from all others, and how true they are.

scikit-learn's definitions, in float64. `scores` are the probabilities of the positive class, (rows,); `positive` says
which rows are of it, (rows,); `weights`, (rows,) at least 0 and not all 0, say how much a row counts; None: each 1.
What is not defined on the rows, as AUROC where all are of one class, is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

DEPTHS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of the rows, of the highest scores, for lift and capture."""


def binary_metrics(scores: Floats, positive: Flags, weights: Floats | None = None) -> dict[str, float | None]:
    """One number each; `rows` and `positives` are counts, or sums of weights.

    `gini` is 2 AUROC - 1. `ks` is the largest distance of the cumulative shares of both groups (Kolmogorov and
    Smirnov), `ks_threshold` the score there.
    """
    from sklearn import metrics as sk

    own = np.ones(len(scores)) if weights is None else weights
    rows, positives = float(own.sum()), float(own[positive].sum())
    found: dict[str, float | None] = {"rows": rows, "positives": positives}
    found |= {"rate": positives / rows if rows else None, "mean_score": _mean(scores, own)}
    both = 0 < positives < rows
    clipped = np.clip(scores, np.finfo(np.float64).eps, 1 - np.finfo(np.float64).eps)
    losses = -np.where(positive, np.log(clipped), np.log1p(-clipped))
    auroc = float(sk.roc_auc_score(positive, scores, sample_weight=own)) if both else None
    found["auroc"] = auroc
    found["gini"] = None if auroc is None else 2 * auroc - 1
    found |= dict(zip(("ks", "ks_threshold"), _ks(scores, positive, own) if both else (None, None), strict=True))
    found["average_precision"] = (
        float(sk.average_precision_score(positive, scores, sample_weight=own)) if positives else None
    )
    found["log_loss"] = _mean(losses, own)
    found["brier"] = _mean((scores - positive) ** 2, own)
    return found


def _mean(values: Floats, weights: Floats) -> float | None:
    return float(np.average(values, weights=weights)) if weights.sum() else None


def _ks(scores: Floats, positive: Flags, weights: Floats) -> tuple[float, float]:
    from sklearn.metrics import roc_curve

    false_rate, true_rate, thresholds = roc_curve(positive, scores, sample_weight=weights, drop_intermediate=False)
    place = int(np.argmax(np.abs(true_rate - false_rate)))
    return float(abs(true_rate - false_rate)[place]), float(min(thresholds[place], 1.0))


def lift_table(
    scores: Floats, positive: Flags, weights: Floats | None = None, depths: Sequence[float] = DEPTHS
) -> list[dict[str, float | None]]:
    """Of the rows with the highest scores, by their share of all: rate of the positive class, lift, and capture.

    Lift: that rate by the rate in all rows. Capture: share of all positive rows that are among them. Rows of one score
    count in part where a depth falls between them.
    """
    own = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    _, first = np.unique(-scores[order], return_index=True)
    of_scores = np.add.reduceat(own[order], first)
    positives = np.add.reduceat((own * positive)[order], first)
    share = np.concatenate([[0], of_scores.cumsum()]) / own.sum()
    total = positives.sum()
    captured = np.concatenate([[0], positives.cumsum()])
    table: list[dict[str, float | None]] = []
    for depth in depths:
        caught = float(np.interp(depth, share, captured))
        lift, capture = (caught / total / depth, caught / total) if total else (None, None)
        table.append({"depth": depth, "rate": caught / (depth * own.sum()), "lift": lift, "capture": capture})
    return table


def reliability_bins(
    scores: Floats, positive: Flags, weights: Floats | None = None, num_bins: int = 10
) -> list[dict[str, float]]:
    """Bins of nearly equal weight by score: bounds, `weight`, mean score, observed rate. Equal scores stay together."""
    own = np.ones(len(scores)) if weights is None else weights
    edges = quantile_edges(scores, own, num_bins)
    place = np.searchsorted(edges, scores, side="right")
    bins = []
    for number in range(len(edges) + 1):
        here = (place == number) & (own > 0)
        if here.any():
            bins.append(
                {
                    "lowest": float(scores[here].min()),
                    "highest": float(scores[here].max()),
                    "weight": float(own[here].sum()),
                    "mean_score": float(np.average(scores[here], weights=own[here])),
                    "rate": float(np.average(positive[here], weights=own[here])),
                }
            )
    return bins


def quantile_edges(values: Floats, weights: Floats, num_bins: int) -> Floats:
    """Inner edges, ascending and distinct, of bins of nearly equal weight; a value on an edge is in the bin above."""
    order = np.argsort(values, kind="stable")
    ordered, share = values[order], weights[order].cumsum() / weights.sum()
    wanted = np.arange(1, num_bins) / num_bins
    found = ordered[np.minimum(np.searchsorted(share, wanted - 1e-12, side="right"), len(ordered) - 1)]
    edges = np.unique(found)
    return np.asarray(edges[edges > ordered[0]])


def brier_decomposition(
    scores: Floats, positive: Flags, weights: Floats | None = None, num_bins: int = 10
) -> dict[str, float]:
    """The Brier score as reliability - resolution + uncertainty (Murphy 1973), over bins of nearly equal weight.

    `within`: what is left since scores differ within a bin (Stephenson, Coelho and Jolliffe 2008): with it the four add
    up to the Brier score. `ece`: expected calibration error over the same bins.
    """
    bins = reliability_bins(scores, positive, weights, num_bins)
    own = np.ones(len(scores)) if weights is None else weights
    share = np.array([each["weight"] for each in bins]) / own.sum()
    mean = np.array([each["mean_score"] for each in bins])
    rate = np.array([each["rate"] for each in bins])
    base = float(np.average(positive, weights=own))
    parts = {
        "reliability": float((share * (mean - rate) ** 2).sum()),
        "resolution": float((share * (rate - base) ** 2).sum()),
        "uncertainty": base * (1 - base),
    }
    brier = float(np.average((scores - positive) ** 2, weights=own))
    within = brier - parts["reliability"] + parts["resolution"] - parts["uncertainty"]
    return {"brier": brier, **parts, "within": within, "ece": float((share * np.abs(mean - rate)).sum())}


def curve(scores: Floats, positive: Flags, weights: Floats | None = None, points: int = 101) -> dict[str, Any] | None:
    """The ROC curve at so many false positive rates; None where one of the groups is empty."""
    from sklearn.metrics import roc_curve

    own = np.ones(len(scores)) if weights is None else weights
    if not 0 < own[positive].sum() < own.sum():
        return None
    false_rate, true_rate, _ = roc_curve(positive, scores, sample_weight=own)
    grid = np.linspace(0, 1, points)
    return {"false_positive_rate": grid.tolist(), "true_positive_rate": np.interp(grid, false_rate, true_rate).tolist()}
