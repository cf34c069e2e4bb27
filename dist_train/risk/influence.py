"""What columns do to scores, over all rows: importance by permutation, and partial dependence.

Rows come in as arrays of probabilities of changed rows; who changes and scores the rows is another matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_train.determinism.keyed_random import derive
from dist_train.risk.beside import log_losses
from dist_train.risk.binary import binary_metrics

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MOST_ROWS = 2000
MOST_COLUMNS = 300
REPEATS = 3
DEPENDENCE_ROWS = 500
DRAWN_COLUMNS = 6
DRAWN_ROWS = 20


def order_of(count: int, seed: int, *purpose: object) -> Integers:
    """A permutation of so many rows that is a function of (seed, purpose)."""
    key = derive("influence", *map(str, purpose), seed) % 2**64
    return np.random.Generator(np.random.PCG64(key)).permutation(count)


def scored_as(probabilities: Floats, targets: Integers, weights: Floats, positive: int) -> tuple[float, float | None]:
    """Log loss over all classes, and AUROC of the positive class."""
    loss = float(np.average(log_losses(probabilities, targets), weights=weights))
    return loss, binary_metrics(probabilities[:, positive], targets == positive, weights)["auroc"]


def importance_of(
    name: str, plain: tuple[float, float | None], permuted: Sequence[tuple[float, float | None]]
) -> dict[str, Any]:
    """What the scores lose where the cells of a column are permuted among the rows (Breiman 2001).

    `loss` is the rise of the log loss, the mean over the permutations, and `loss_std` its standard deviation; `auroc`
    is the fall of the AUROC.
    """
    rises = np.array([loss - plain[0] for loss, _ in permuted])
    falls = [plain[1] - auroc for _, auroc in permuted if plain[1] is not None and auroc is not None]
    return {
        "feature": name,
        "loss": float(rises.mean()),
        "loss_std": float(rises.std(ddof=1)) if len(rises) > 1 else None,
        "auroc": float(np.mean(falls)) if falls else None,
    }


def dependence_of(name: str, values: Sequence[Any], scores: Sequence[Floats], weights: Floats) -> dict[str, Any]:
    """The mean score if every row had a value (Friedman 2001), and the scores of some rows (Goldstein et al. 2015).

    `scores`: of each value the probability of the positive class of each row, (rows,).
    """
    return {
        "feature": name,
        "values": list(values),
        "mean": [float(np.average(of_value, weights=weights)) for of_value in scores],
        "rows": [[float(of_value[row]) for of_value in scores] for row in range(min(DRAWN_ROWS, len(weights)))],
    }
