"""The effects of columns on the scores of a trained model, and the reasons of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from dist_train.determinism.arithmetic import Arithmetic
from dist_train.errors import UserError
from dist_train.risk.calibration import Calibration
from dist_train.risk.reasons import ExplainedModel, effects_of, has_slopes, log_odds
from dist_train.run.scoring.members import Member, shared
from dist_train.tasks.base import Explainable, Task
from dist_train.training.protocols import Rows

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Explanation:
    """Effects of columns on the log-odds of class `positive`, log p / (1 - p).

    `log_odds`, (rows,), = `baseline`, those of a typical row, + the sum of `effects`, (rows, columns), + `errors`. A
    typical row has the median of each number and the most frequent category. `calibrated`: the log-odds are those of
    calibrated probabilities.
    """

    positive: str
    calibrated: bool
    columns: list[str]
    baseline: float
    log_odds: Floats
    effects: Floats

    @property
    def errors(self) -> Floats:
        """What the effects of each row fail to add up to, (rows,)."""
        return np.asarray(self.log_odds - self.baseline - self.effects.sum(1))

    def reasons(self, number: int) -> pl.DataFrame:
        """The table of `reasons_table` for these rows."""
        return reasons_table(self.numbers(number), self.columns)

    def numbers(self, number: int) -> Tensor:
        """The numbers that a table of so many reasons is made of, (rows, width_of_reasons(number)) float64.

        A reason is the place of a column and its effect; both are NaN where fewer columns raise the log-odds.
        """
        order = np.argsort(-self.effects, axis=1, kind="stable")[:, :number]
        largest = np.take_along_axis(self.effects, order, axis=1)
        pairs = np.full((len(order), number, 2), np.nan)
        pairs[:, : order.shape[1], 0], pairs[:, : order.shape[1], 1] = order, largest
        pairs[:, : order.shape[1]][largest <= 0] = np.nan
        others = self.effects.sum(1) - np.nan_to_num(pairs[:, :, 1]).sum(1)
        baseline = np.full(len(order), self.baseline)
        parts = [self.log_odds, baseline, *pairs.reshape(len(order), -1).T, others, self.errors]
        return torch.from_numpy(np.stack(parts, axis=1))


def width_of_reasons(number: int) -> int:
    """Numbers of a row for so many reasons."""
    return 4 + 2 * number


def names_of_reasons(number: int) -> list[str]:
    """Columns of `reasons_table`."""
    pairs = (name for place in range(1, number + 1) for name in (f"reason_{place}", f"effect_{place}"))
    return ["log_odds", "baseline_log_odds", *pairs, "other_effects", "reasons_error"]


def reasons_table(numbers: Tensor, columns: Sequence[str]) -> pl.DataFrame:
    """For each row the columns of the table that raise its log-odds most; null where fewer do.

    Of the columns `log_odds`, `baseline_log_odds`, `reason_1`, `effect_1`, ..., `other_effects`, `reasons_error` the
    first is the sum of all others that are numbers. `numbers` are those of `Explanation.numbers`.
    """
    names = names_of_reasons((numbers.shape[1] - width_of_reasons(0)) // 2)
    made = []
    for name, values in zip(names, numbers.numpy().T, strict=True):
        if name.startswith("reason_"):
            made.append(pl.Series(name, [None if v != v else columns[int(v)] for v in values], dtype=pl.String))
        else:
            made.append(pl.Series(name, values).fill_nan(None))
    return pl.DataFrame(made)


class Explainer:
    """Explains the scores of members' mean probabilities; `columns` are those of a table that a row is scored by.

    Raises:
        UserError: the task, or a model, has no columns whose effects are known.
    """

    def __init__(
        self,
        members: Sequence[Member],
        columns: Sequence[str],
        class_names: Sequence[str],
        positive: int,
        calibration: Calibration | None,
    ) -> None:
        self.positive_class = class_names[positive]
        self._columns = list(columns)
        self._positive = positive
        self._calibration = calibration
        self.explains_calibrated = calibration is not None and has_slopes(calibration)
        places = {name: place for place, name in enumerate(columns)}
        self._tasks: list[Task] = [member.task for member in members]
        self._models = []
        for member in members:
            task = member.task
            if not isinstance(task, Explainable):
                raise UserError("reasons: rows of this task have no columns whose effects are known")
            inputs = zip(task.columns_of_inputs, task.continuous_inputs, strict=True)
            typical, of_inputs = task.typical_inputs(), [names if moves else None for names, moves in inputs]
            self._models.append(ExplainedModel(member.model, Arithmetic().probabilities, typical, of_inputs, places))

    def described(self) -> dict[str, dict[str, Any]]:
        """What is explained, for a line of JSON."""
        return {"reasons": {"class": self.positive_class, "calibrated": self.explains_calibrated}}

    def explain(self, rows_of: Callable[[Task], Rows], probabilities: Tensor) -> Explanation:
        """Explain rows, of which the shipped `probabilities`, (rows, classes), are known."""
        inputs = [rows.slice(0, len(rows)) for rows in map(shared(rows_of), self._tasks)]
        calibration = self._calibration if self.explains_calibrated else None
        effects, baseline = effects_of(self._models, inputs, len(self._columns), self._positive, calibration)
        return Explanation(
            positive=self.positive_class,
            calibrated=self.explains_calibrated,
            columns=self._columns,
            baseline=baseline,
            log_odds=log_odds(probabilities, self._positive).numpy(),
            effects=effects.numpy(),
        )
