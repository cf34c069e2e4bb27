"""Where training stands and what it has reached so far: the small part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_train.determinism.position import Position
from dist_train.training.selection import Selection


class Progress:
    """Steps done, position in the data, the best validation, how long it has not been bettered, and what followed.

    `selection` says which metric is compared. `best_value` is its best value so far, None before the first.
    `reductions` of the learning rate come after each `plateau_patience` evaluations in a row without a better value;
    None: there are none.
    """

    def __init__(self, selection: Selection = Selection(), plateau_patience: int | None = None) -> None:  # noqa: B008
        self.selection = selection
        self.plateau_patience = plateau_patience
        self.step = 0
        self.position = Position()
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.evaluations_without_gain = 0
        self.reductions = 0
        self.train_seconds = 0.0
        self.evaluation_due = False
        """The step has been trained, but not evaluated as it should be: the run was stopped in the middle of that."""

    def samples(self, num_rows: int) -> int:
        """Rows trained so far, over all ranks and epochs of `num_rows`."""
        return self.position.epoch * num_rows + self.position.rows

    def epoch_number(self) -> int:
        """Epoch that the last step belonged to, counted from 1."""
        return self.position.epoch + (1 if self.position.rows else 0)

    def note_validation(self, value: float) -> bool:
        """Count an evaluation; true when it is the best so far."""
        if self.selection.betters(value, self.best_value):
            self.best_value, self.best_step, self.evaluations_without_gain = value, self.step, 0
            return True
        self.evaluations_without_gain += 1
        if self.plateau_patience and self.evaluations_without_gain % self.plateau_patience == 0:
            self.reductions += 1
        return False

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether that many evaluations in a row have not been the best; None: patience never ends."""
        return patience is not None and self.evaluations_without_gain >= patience

    def trains_on(self, total_steps: int, patience: int | None) -> bool:
        """Whether a step or an evaluation is still to come."""
        return (self.step < total_steps and not self.out_of_patience(patience)) or self.evaluation_due

    def state_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "step": self.step,
            "epoch": self.position.epoch,
            "rows": self.position.rows,
            "best_value": self.best_value,
            "best_step": self.best_step,
            "selected_by": self.selection.metric,
            "evaluations_without_gain": self.evaluations_without_gain,
            "reductions": self.reductions,
            "train_seconds": self.train_seconds,
            "evaluation_due": self.evaluation_due,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where the saved state stood. A best of another metric is none, and begins anew."""
        state = migrated_progress(state)
        self.step = state["step"]
        self.position = Position(state["epoch"], state["rows"])
        same = state["selected_by"] == self.selection.metric
        self.best_value = state["best_value"] if same else None
        self.best_step = state["best_step"] if same else None
        self.evaluations_without_gain = state["evaluations_without_gain"] if same else 0
        self.reductions = state["reductions"]
        self.train_seconds = state["train_seconds"]
        self.evaluation_due = state["evaluation_due"]


def migrated_progress(state: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of an earlier program in the form of now: the log loss was what chose."""
    copy = dict(state)
    if "best_loss" in copy:
        copy |= {"best_value": copy.pop("best_loss"), "selected_by": "loss", "reductions": 0}
    return copy
