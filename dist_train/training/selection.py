"""Which validation metric chooses the weights that are shipped, and in which direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_train.config.rules import HIGHER_IS_BETTER
from dist_train.config.schema import TrainConfig
from dist_train.errors import UserError
from dist_train.training.metrics import direction_of

OBJECTIVE = "objective"
"""The loss that is trained, on rows that are evaluated on, where it is not the log loss."""


@dataclass(frozen=True)
class Selection:
    """The metric of `train.select_by`."""

    metric: str = "loss"
    higher_is_better: bool = False

    @classmethod
    def of(cls, train: TrainConfig) -> Selection:
        """That of a configuration.

        Raises:
            UserError: the metric is a registered one without a direction.
        """
        name = train.select_by
        if name is None:
            return cls(OBJECTIVE if trains_another_loss(train) else "loss")
        return cls(name, HIGHER_IS_BETTER[name] if name in HIGHER_IS_BETTER else direction_of(name))

    def value(self, metrics: Mapping[str, Any]) -> float:
        """The value of the metric; of `objective` it is `loss` where the two are one.

        Raises:
            UserError: it is not a finite number.
        """
        value = metrics.get(self.metric, metrics["loss"] if self.metric == OBJECTIVE else None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(
                f"train.select_by: {self.metric} is {value!r} on the validation rows: not a number to choose by"
            )
        return float(value)

    def betters(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best one so far; None: there is none."""
        if best is None:
            return not math.isnan(value)
        return value > best if self.higher_is_better else value < best


def trains_another_loss(train: TrainConfig) -> bool:
    """Whether what is trained differs from the log loss in more than label smoothing."""
    return train.class_weights is not None or train.class_sampling == "balanced" or train.loss != "cross_entropy"
