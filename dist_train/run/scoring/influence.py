"""Importance and partial dependence of the columns of a trained model: its rows are changed and scored again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.config.rules import require_columns_of_model
from dist_train.config.schema import ReportConfig
from dist_train.data.sources import ResidentRows
from dist_train.risk import influence
from dist_train.run.scoring.members import mean_probabilities, shared
from dist_train.run.scoring.predictions import weights_of
from dist_train.run.scoring.predictor import Predictor
from dist_train.tasks.base import Explainable, Task

Inputs = tuple[Tensor, ...]
Change = Callable[[Task, Inputs], Inputs]
"""Changed inputs of rows, as a task encodes them."""


def influence_of(predictor: Predictor, report: ReportConfig, seed: int, positive: int) -> dict[str, Any]:
    """`importance` and `dependence` of report.json on rank 0; empty on other ranks, and of a task without columns.

    Called by all ranks. `positive` is the place of the positive class.

    Raises:
        UserError: `report.dependence` names a column that is none of the model's.
    """
    columns = predictor.input_columns
    require_columns_of_model(report, columns)
    if not all(isinstance(member.task, Explainable) for member in predictor.members):
        return {}
    for split in ("valid", "test"):
        changed = ChangedRows.of(predictor, split, seed)
        if changed is not None:
            break
    else:
        return {}
    importance = _importance(changed, columns, seed, positive, split)
    lines = importance["columns"] if importance else []
    most = report.dependence or [line["feature"] for line in lines[: influence.DRAWN_COLUMNS]]
    drawn: list[str] = predictor.collectives.on_rank_zero(lambda: most)
    dependence = [changed.dependence(name, positive) for name in drawn]
    found = {"importance": importance, "dependence": [line for line in dependence if line]}
    return found if predictor.collectives.is_main else {}


class ChangedRows:
    """At most so many rows of a split, drawn as a function of the seed, whose cells can be changed."""

    def __init__(self, predictor: Predictor, rows: dict[Task, ResidentRows]) -> None:
        self._predictor = predictor
        self._rows = rows
        first = next(iter(rows.values()))
        self.targets = first.targets.cpu().numpy()
        self.weights = weights_of(first)

    @classmethod
    def of(cls, predictor: Predictor, split: str, seed: int) -> ChangedRows | None:
        """Of a split; None where it has no rows, or each member of an ensemble other ones."""
        if split == "valid" and len(predictor.members) > 1 and predictor.config.data.folds is not None:
            return None

        def drawn(task: Task) -> ResidentRows | None:
            source = task.labelled(split)
            if not len(source):
                return None
            chosen = np.sort(influence.order_of(len(source), seed, "rows")[: influence.MOST_ROWS])
            found = source.read(torch.from_numpy(chosen))  # type: ignore[attr-defined]
            return ResidentRows(found.inputs, found.targets, torch.arange(len(chosen)), found.weights)

        rows_of, rows = shared(drawn), {}
        for task in (member.task for member in predictor.members):
            of_task = rows_of(task)
            if of_task is None:
                return None
            rows[task] = of_task
        return cls(predictor, rows)

    def scores(self, change: Change | None = None, most: int | None = None) -> np.ndarray[Any, Any] | None:
        """Shipped probabilities of the rows, or of the first ones, (rows, classes), on rank 0; None on other ranks."""
        predictor = self._predictor

        def rows_of(task: Task) -> ResidentRows:
            rows = self._rows[task]
            inputs = rows.slice(0, most or len(rows))
            changed = change(task, tuple(x.clone() for x in inputs)) if change else inputs
            return ResidentRows(changed, rows.targets[:most], rows.row_numbers[:most])

        batch_size = predictor.config.evaluation.batch_size
        own = mean_probabilities(predictor.members, rows_of, batch_size, predictor.collectives)
        return None if own is None else predictor.shipped(own).numpy()

    def permuted(self, name: str, order: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Probabilities where a row has the cell of another row in one column."""
        places = torch.from_numpy(order)

        def change(task: Task, inputs: Inputs) -> Inputs:
            for x, own in zip(inputs, _values_of(task, name), strict=True):
                x[:, own] = x[places.to(x.device)][:, own]
            return inputs

        return self.scores(change)

    def dependence(self, name: str, positive: int) -> dict[str, Any] | None:
        """Scores where every row has the same cell in one column; None on other ranks, and for dates and amounts."""
        first = self._predictor.members[0].task
        assert isinstance(first, Explainable)
        values = first.typical_values(name)
        found = []
        for value in values:

            def change(task: Task, inputs: Inputs, value: Any = value) -> Inputs:
                assert isinstance(task, Explainable)
                for x, cell, own in zip(inputs, task.encoded_cell(name, value), _values_of(task, name), strict=True):
                    x[:, own] = cell[:, own]
                return inputs

            found.append(self.scores(change, influence.DEPENDENCE_ROWS))
        if not values or found[0] is None:
            return None
        scores = [of_value[:, positive] for of_value in found if of_value is not None]
        return influence.dependence_of(name, values, scores, self.weights[: len(scores[0])])


def _importance(
    changed: ChangedRows, columns: Sequence[str], seed: int, positive: int, split: str
) -> dict[str, Any] | None:
    plain = changed.scores()
    repeats = influence.REPEATS if len(columns) <= 50 else 1
    found = []
    for name in columns[: influence.MOST_COLUMNS]:
        permuted = [
            changed.permuted(name, influence.order_of(len(changed.targets), seed, name, repeat))
            for repeat in range(repeats)
        ]
        if plain is None:
            continue
        known = (changed.targets, changed.weights, positive)
        of_repeats = [influence.scored_as(scores, *known) for scores in permuted if scores is not None]
        found.append(influence.importance_of(name, influence.scored_as(plain, *known), of_repeats))
    if plain is None:
        return None
    return {
        "rows": split,
        "count": len(changed.targets),
        "repeats": repeats,
        "left_out": max(0, len(columns) - influence.MOST_COLUMNS),
        "columns": sorted(found, key=lambda line: -line["loss"]),
    }


def _values_of(task: Task, name: str) -> list[list[int]]:
    """Of each input of a task's model, the places of the values that are made of a column."""
    assert isinstance(task, Explainable)
    return [[i for i, column in enumerate(names) if column == name] for names in task.columns_of_inputs]
