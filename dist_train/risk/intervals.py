"""Confidence intervals: keyed bootstrap of metrics, Wilson's interval of shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from dist_train.determinism.keyed_random import derive

Floats = npt.NDArray[np.float64]

LEVEL = 0.95


def bootstrap_intervals(
    metrics: Callable[[Floats], Mapping[str, float | None]], weights: Floats, *, repeats: int, seed: int, purpose: str
) -> dict[str, list[float] | None]:
    """Percentile intervals at 95 % of numbers that `metrics` gives for weights of the rows (Efron 1979).

    A draw of the rows with replacement weighs each by how often it was drawn. Each draw is a function of (seed,
    purpose, its number). None where a number was not defined in a draw.
    """
    drawn: dict[str, list[float | None]] = {}
    rows = len(weights)
    for repeat in range(repeats):
        key = derive("bootstrap", purpose, seed, repeat) % 2**64
        counts = np.bincount(np.random.Generator(np.random.PCG64(key)).integers(0, rows, rows), minlength=rows)
        for name, value in metrics(weights * counts).items():
            drawn.setdefault(name, []).append(value)
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return {
        name: None if None in values else [float(x) for x in np.quantile(np.array(values, dtype=np.float64), tails)]
        for name, values in drawn.items()
    }


def share_interval(part: float, whole: float) -> list[float]:
    """Wilson's interval (1927) at 95 % of a share; of weighted rows, with their sums."""
    from scipy.stats import norm

    if whole <= 0:
        return [0.0, 1.0]
    z, share = float(norm.ppf((1 + LEVEL) / 2)), part / whole
    centre = (share + z * z / (2 * whole)) / (1 + z * z / whole)
    half = z / (1 + z * z / whole) * float(np.sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole)))
    # of a share of 0 or 1 rounding would leave it outside
    return [min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)]
