"""Probabilities of rows with what is known of the rows: scored, averaged, joined over folds, written as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from dist_train.tasks.base import Task
from dist_train.training.protocols import Rows, Source


@dataclass(frozen=True)
class Predictions:
    """Of some rows, all on the CPU: probabilities (rows, classes) float64, class indices, numbers in the data, weights.

    `weights` is None where every row counts 1. `folds` are the folds that the rows validate, (rows,), None without
    folds.
    """

    task: Task
    probabilities: Tensor
    targets: Tensor
    rows: Tensor
    weights: Tensor | None
    folds: Tensor | None

    @classmethod
    def of(cls, task: Task, rows: Source, probabilities: Tensor, fold: int | None) -> Predictions:
        """Of the rows of a split."""
        return cls(
            task,
            probabilities,
            rows.targets.cpu(),
            rows.row_numbers.cpu(),
            None if rows.weights is None else rows.weights.cpu(),
            None if fold is None else torch.full((len(rows),), fold),
        )

    def metrics(self) -> dict[str, Any] | None:
        """Those of the task; None where there are no rows."""
        weights = () if self.weights is None else (self.weights,)  # a task need not take any
        return self.task.metrics(self.probabilities, self.targets, *weights) if len(self.targets) else None

    def parquet(self) -> bytes:
        """A Parquet file with `row` (from 0, in the data), `fold`, `target`, and `probability_<class>`, by row."""
        names = self.task.class_names
        columns: dict[str, Any] = {"row": self.rows.numpy()}
        if self.folds is not None:
            columns["fold"] = self.folds.numpy()
        columns["target"] = pl.Series([names[target] for target in self.targets.tolist()], dtype=pl.String)
        columns |= {f"probability_{name}": self.probabilities[:, i].numpy() for i, name in enumerate(names)}
        stream = BytesIO()
        pl.DataFrame(columns).sort("row").write_parquet(stream)
        return stream.getvalue()


def weights_of(rows: Rows) -> npt.NDArray[np.float64]:
    """How much each row counts, (rows,); 1 where nothing says otherwise."""
    return np.ones(len(rows)) if rows.weights is None else rows.weights.cpu().double().numpy()


def mean_of(predictions: Sequence[Predictions]) -> Predictions:
    """The mean over several predictions for the same rows."""
    total = predictions[0].probabilities.clone()
    for other in predictions[1:]:
        assert torch.equal(other.rows, predictions[0].rows)  # all folds leave the same rows to test on
        total += other.probabilities
    return replace(predictions[0], probabilities=total.div_(len(predictions)), folds=None)


def joined(predictions: Sequence[Predictions]) -> Predictions:
    """Predictions for different rows, one after the other."""
    if len(predictions) == 1:
        return predictions[0]

    def all_of(name: str) -> Tensor | None:
        parts = [getattr(each, name) for each in predictions]
        return None if parts[0] is None else torch.cat(parts)

    names = ("probabilities", "targets", "rows", "weights", "folds")
    return Predictions(predictions[0].task, **{name: all_of(name) for name in names})  # type: ignore[arg-type]
