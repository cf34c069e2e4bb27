"""Where training stands and what it has reached so far: the small part of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dist_train.determinism.position import Position


class Progress:
    """Steps done, position in the data, the best validation loss, and how long it has not been bettered."""

    def __init__(self) -> None:
        self.step = 0
        self.position = Position()
        self.best_loss = math.inf
        self.best_step: int | None = None
        self.evaluations_without_gain = 0
        self.train_seconds = 0.0
        self.evaluation_due = False
        """The step has been trained, but not evaluated as it should be: the run was stopped in the middle of that."""

    def samples(self, num_rows: int) -> int:
        """Rows trained so far, over all ranks and epochs of `num_rows`."""
        return self.position.epoch * num_rows + self.position.rows

    def epoch_number(self) -> int:
        """Epoch that the last step belonged to, counted from 1."""
        return self.position.epoch + (1 if self.position.rows else 0)

    def note_validation(self, loss: float) -> bool:
        """Count an evaluation; true when it is the best so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_without_gain = loss, self.step, 0
            return True
        self.evaluations_without_gain += 1
        return False

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether that many evaluations in a row have not been the best; None: patience never ends."""
        return patience is not None and self.evaluations_without_gain >= patience

    def trains_on(self, total_steps: int, patience: int | None) -> bool:
        """Whether a step or an evaluation is still to come."""
        return (self.step < total_steps and not self.out_of_patience(patience)) or self.evaluation_due

    def state_dict(self) -> dict[str, Any]:
        """JSON types; an infinite loss is None."""
        return {
            "step": self.step,
            "epoch": self.position.epoch,
            "rows": self.position.rows,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
            "evaluations_without_gain": self.evaluations_without_gain,
            "train_seconds": self.train_seconds,
            "evaluation_due": self.evaluation_due,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where the saved state stood."""
        self.step = state["step"]
        self.position = Position(state["epoch"], state["rows"])
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.best_step = state["best_step"]
        self.evaluations_without_gain = state["evaluations_without_gain"]
        self.train_seconds = state["train_seconds"]
        self.evaluation_due = state["evaluation_due"]
