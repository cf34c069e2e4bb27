"""A small table, and an estimator that trains on it in an instant."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from dist_train import Classifier

# One evaluation, at the end.
QUICK = ("model.hidden_dim=8", "evaluation.every_steps=1000000")


def quick(**arguments: Any) -> Classifier:
    """A small network, some steps."""
    overrides = (*QUICK, *arguments.pop("overrides", ()))
    return Classifier(**{"epochs": 3, "learning_rate": 1e-2, "device": "cpu"} | arguments, overrides=overrides)


def loans(rows: int = 120) -> tuple[pl.DataFrame, pl.Series]:
    """Numbers, text, a code, missing cells; three classes as text."""
    rng = np.random.default_rng(5)
    income, branch = rng.normal(size=rows), rng.integers(100, 103, size=rows)
    purpose = rng.choice(["car", "home", "tax"], size=rows)
    score = income + (purpose == "home") + 0.2 * rng.normal(size=rows)
    table = pl.DataFrame(
        {
            "income": pl.Series(np.where(rng.random(rows) < 0.1, np.nan, income)).fill_nan(None),
            "purpose": purpose,
            "branch": branch,
        }
    )
    return table, pl.Series("risk", np.array(["high", "low", "medium"])[np.digitize(score, [0.0, 1.0])])
