"""Small tables for the commands, and a small run trained on one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

NUM_ROWS = 240
CLASSES = ("high", "low", "mid")

# A model that trains within a second.
QUICK = (
    "data.target=tier",
    "model.hidden_dim=8",
    "train.epochs=4",
    "optim.lr=0.05",
    "train.global_batch_size=64",
    "schedule.warmup_steps=1",
    "wandb.mode=disabled",
    "runtime.device=cpu",
)


def clients(num_rows: int = NUM_ROWS) -> pl.DataFrame:
    """Three classes, two columns of numbers (one with holes), an integer and a text column, which bear on the class."""
    random = np.random.default_rng(7)
    tier = random.integers(0, 3, num_rows)
    income = np.exp(random.normal(10, 1, num_rows)) * (tier + 1)
    return pl.DataFrame(
        {
            "income": pl.Series(income).set(pl.Series(random.random(num_rows) < 0.1), None),
            "age": random.integers(18, 90, num_rows),
            "purpose": random.choice(["car", "house", "träume, groß"], num_rows).tolist(),
            "utilisation": (random.random(num_rows) / (tier + 1)).round(6),
            "tier": [CLASSES[t] for t in tier],
        }
    )


def run_arguments(folder: Path, data: Path | str) -> list[str]:
    """What `train` needs to train a small run in `folder` on the file `data`."""
    return [f"run.dir={folder.parent}", f"run.name={folder.name}", f"data.path={data}", *QUICK]
