"""From probabilities to decisions: the threshold of least cost, and bands of scores."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_train.risk.binary import quantile_edges
from dist_train.risk.intervals import share_interval

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def cost_at(
    scores: Floats, positive: Flags, weights: Floats, threshold: float, *, false_positive: float, false_negative: float
) -> dict[str, float | None]:
    """What comes of calling rows positive whose score is at least `threshold`; `cost` is the mean over all rows."""
    selected = scores >= threshold
    hit, false_alarm = weights[selected & positive].sum(), weights[selected & ~positive].sum()
    missed, total = weights[~selected & positive].sum(), weights.sum()
    return {
        "threshold": float(threshold),
        "cost": float((false_positive * false_alarm + false_negative * missed) / total),
        "selected": float((hit + false_alarm) / total),
        "precision": float(hit / (hit + false_alarm)) if hit + false_alarm else None,
        "recall": float(hit / (hit + missed)) if hit + missed else None,
        "false_positive_rate": float(false_alarm / (total - hit - missed)) if total > hit + missed else None,
    }


def best_threshold(
    scores: Floats, positive: Flags, weights: Floats, *, false_positive: float, false_negative: float
) -> float:
    """The threshold of the least cost on these rows, halfway between two scores; 0 selects all and 1 or more none."""
    values, place = np.unique(scores, return_inverse=True)
    missed = false_negative * np.bincount(place, weights * positive, minlength=len(values))
    alarms = false_positive * np.bincount(place, weights * ~positive, minlength=len(values))
    # cost[i]: the values from i on are selected
    cost = np.concatenate([[0.0], missed.cumsum()]) + np.concatenate([alarms[::-1].cumsum()[::-1], [0.0]])
    first = int(np.argmin(cost))
    if first == 0:
        return 0.0
    if first == len(values):
        return float(np.nextafter(max(1.0, values[-1]), 2))
    return float((values[first - 1] + values[first]) / 2)


def score_bands(edges: Floats, scores: Floats, positive: Flags, weights: Floats) -> dict[str, Any]:
    """Bands of scores between `edges`, from the lowest: observed rate with its interval, and whether it rises.

    `inversions`: neighbouring bands of which the higher one has the lower rate. `significant_inversions`: those whose
    intervals do not overlap.
    """
    bounds = [0.0, *edges.tolist(), 1.0]
    place = np.searchsorted(edges, scores, side="right")
    bands: list[dict[str, Any]] = []
    for number in range(len(edges) + 1):
        here = place == number
        weight, part = float(weights[here].sum()), float(weights[here & positive].sum())
        band = {"from": bounds[number], "to": bounds[number + 1], "rows": int(here.sum()), "weight": weight}
        if weight:
            mean = float(np.average(scores[here], weights=weights[here]))
            band |= {"mean_score": mean, "rate": part / weight, "interval": share_interval(part, weight)}
        bands.append(band)
    rates = [band for band in bands if "rate" in band]
    pairs = list(pairwise(rates))
    inverted = [(low, high) for low, high in pairs if high["rate"] < low["rate"]]
    return {
        "bands": bands,
        "monotone": not inverted,
        "inversions": len(inverted),
        "significant_inversions": sum(high["interval"][1] < low["interval"][0] for low, high in inverted),
    }


def band_edges(scores: Floats, weights: Floats, num_bands: int = 10) -> Floats:
    """Edges of bands that hold nearly equal shares of the rows that they are made of."""
    return quantile_edges(scores, weights, num_bands)
