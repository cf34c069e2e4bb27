"""Reasons of records, from the run that a served file was exported from: they need the gradients of its models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import polars as pl
import torch

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.run.scoring.explanation import names_of_reasons
from dist_train.run.scoring.predictor import Predictor
from dist_train.serving.export import typed_rows
from dist_train.tasks.tabular import TabularTask


class Reasons:
    """Explains cells as `Predictor.explain` does a table.

    Raises:
        UserError: `run` cannot be read, is no model of a table, or its columns have no known effects.
    """

    def __init__(self, run: Path) -> None:
        torch.set_num_threads(1)  # requests are what is computed side by side
        self._predictor = Predictor(run, Collectives(World()))
        task = self._predictor.members[0].task
        if not isinstance(task, TabularTask):
            raise UserError("reasons: only the model of a table has them")
        self._spec = task.spec
        self.described = self._predictor.explainer().described()["reasons"]
        """The class that they are for, and whether its log-odds are calibrated."""
        self._lock = Lock()  # a model is in evaluation mode, or not, for all threads

    @property
    def most(self) -> int:
        """Columns that a row may have reasons from."""
        return len(self._predictor.input_columns)

    def of(self, names: Sequence[str], cells: Sequence[Sequence[float | str]], number: int) -> list[dict[str, Any]]:
        """So many reasons for each row of the cells of the columns `names`, as JSON types."""
        columns = dict(zip(names, cells, strict=True))
        frame = typed_rows(pl.DataFrame({name: columns[name] for name in self._predictor.input_columns}), self._spec)
        with self._lock:
            explanation, _ = self._predictor.explained(frame)  # the log of a server has no values
            table = explanation.reasons(number)
        log_odds, baseline, *pairs, others, error = names_of_reasons(number)
        return [
            {
                "log_odds": row[log_odds],
                "baseline_log_odds": row[baseline],
                "reasons": [
                    {"column": row[name], "effect": row[effect]}
                    for name, effect in zip(pairs[::2], pairs[1::2], strict=True)
                    if row[name] is not None
                ],
                "other_effects": row[others],
                "reasons_error": row[error],
            }
            for row in table.iter_rows(named=True)
        ]
