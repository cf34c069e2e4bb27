"""Train a session step by step inside a test, without a run folder; the result is plain numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dist_train.config.load import load_config
from dist_train.distributed.collectives import Collectives
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task
from dist_train.training.evaluation import probabilities

BUILTIN = ["data.target=risk_tier", "data.split_column=split", "train.epochs=1", "optim.lr=3e-3"]


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the loss of each step, the weights by name, probabilities of the test rows."""

    losses: npt.NDArray[np.float64]
    weights: dict[str, npt.NDArray[Any]]
    average: dict[str, npt.NDArray[Any]]
    probabilities: npt.NDArray[np.float64]
    """On rank 0."""
    fewest_rows: int


def build(collectives: Collectives, arguments: list[str]) -> Session:
    """The session of a configuration."""
    config = load_config(arguments)
    return Session(config, load_task(config, collectives), collectives)


def train(collectives: Collectives, arguments: list[str]) -> Trained:
    """Train to the end of the configuration."""
    session = build(collectives, arguments)
    losses, fewest = [], 1 << 60
    for batches, _ in session.feed.steps(session.progress.position):
        outcome = session.step(batches, len(losses), wants_stop=False)
        assert bool(outcome.finite)
        losses.append((outcome.totals[0] / outcome.totals[1]).item())
        fewest = min(fewest, *(len(batch.rows) for batch in batches))
        if len(losses) == session.total_steps:
            break
    predicted = probabilities(session.scored, session.task.splits["test"], 2048, session.task, collectives)
    on_main = np.empty((0, 0)) if predicted is None else predicted.numpy()
    weights = {name: value.numpy() for name, value in session.model.state_dict().items()}
    average = {name: value.numpy() for name, value in session.scored.state_dict().items()}
    return Trained(np.array(losses), weights, average, on_main, fewest)


def write_table(path: Path, train_rows: int, other_rows: int = 60) -> list[str]:
    """A small table with numbers, text, missing cells and three classes; the arguments that train on it."""
    rng = np.random.default_rng(7)
    count = train_rows + 2 * other_rows
    x = rng.normal(size=(count, 4)) * [1, 10, 0.1, 3]
    city = rng.choice(["Lund", "Oslo", "Bergen", "Turku"], size=count)
    score = x[:, 0] + 0.1 * x[:, 1] + (city == "Oslo")
    frame = pl.DataFrame(
        {f"x{i}": pl.Series(np.where(rng.random(count) < 0.05, np.nan, x[:, i])).fill_nan(None) for i in range(4)}
        | {
            "city": pl.Series(city),
            "risk": pl.Series(np.array(["low", "medium", "high"])[np.digitize(score, [0.2, 1.2])]),
            "split": pl.Series(["train"] * train_rows + ["valid"] * other_rows + ["test"] * other_rows),
        }
    )
    frame.write_parquet(path)
    return [f"data.path={path}", "data.target=risk", "data.split_column=split", "train.epochs=1", "optim.lr=3e-3"]
