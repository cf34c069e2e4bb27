"""What the loop does when: logging, evaluations, checkpoints, ends; with a fake for every argument."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import Stopped, TrainingFault, UserError
from dist_train.training.loop import WARMUP_STEPS, Ending, Intervals, Loop
from dist_train.training.meter import Meter
from dist_train.training.progress import Progress
from dist_train.training.selection import Selection
from dist_train.training.step import StepResult
from tests.ranks import on_ranks
from tests.training.fakes import FakeFeed, FakeStep

NEVER = 1000


@dataclass
class Rig:
    """A loop with fakes, and what it did to them."""

    losses: Sequence[float] = (2.0, 4.0, 6.0)
    validation: Sequence[float] | None = None
    aurocs: Sequence[Any] = ()
    stop_at: int | None = None
    collectives: Collectives = field(default_factory=lambda: Collectives(World()))
    steps_per_epoch: int = 4
    before_evaluation: Callable[[], None] = lambda: None
    saved: list[int] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.step = FakeStep(self.losses)
        self.feed = FakeFeed(self.steps_per_epoch)
        self.meter = Meter()

    def run(self, **intervals: Any) -> Ending:
        """Train; every rhythm that is not given is `never`."""
        quiet = {"log_steps": NEVER, "save_steps": NEVER, "evaluate_steps": NEVER, "patience": None}
        evaluations, aurocs = iter(self.validation or []), iter(self.aurocs)

        def evaluate() -> dict[str, Any] | None:
            self.before_evaluation()
            return None if self.validation is None else {"loss": next(evaluations), "auroc": next(aurocs, 0.8)}

        loop = Loop(
            self.step,
            self.feed,
            self.progress,
            self.meter,
            Intervals(**(quiet | intervals)),
            self.collectives,
            evaluate=evaluate,
            save=self.saved.append,
            track=self.lines.append,
            wants_stop=lambda: self.stop_at is not None and len(self.step.taken) >= self.stop_at,
        )
        return loop.run()

    def logged(self, split: str, key: str) -> list[Any]:
        """One field of every line of a split."""
        return [line[key] for line in self.lines if line["split"] == split]


def test_lines_hold_the_mean_since_the_line_before() -> None:
    rig = Rig()
    assert rig.run(total_steps=8, log_steps=3) is Ending.FINISHED
    assert rig.logged("train", "step") == [3, 6, 8]
    assert rig.logged("train", "loss") == [4.0, 4.0, 3.0]
    assert rig.logged("train", "epoch") == [1, 2, 2]
    assert rig.logged("train", "samples") == [30, 60, 80]
    assert rig.logged("train", "learning_rate") == [0.1 / 3, 0.1 / 6, 0.1 / 8]
    assert rig.logged("train", "grad_norm") == [1.5] * 3
    assert all(rate > 0 for rate in rig.logged("train", "samples_per_second"))
    assert rig.step.taken == list(range(8))
    assert rig.saved == [8]


@pytest.mark.parametrize(("every", "expected"), [(None, [4, 8, 10]), (3, [3, 6, 9, 10])])
def test_evaluations_at_their_rhythm_and_at_the_end(every: int | None, expected: list[int]) -> None:
    rig = Rig(validation=[5, 4, 6, 7])
    rig.run(total_steps=10, evaluate_steps=every)
    assert rig.logged("valid", "step") == expected
    assert rig.logged("valid", "loss") == [5, 4, 6, 7][: len(expected)]
    assert (rig.progress.best_step, rig.progress.best_value) == (expected[1], 4)


def test_checkpoints_at_their_rhythm_at_each_best_and_at_the_end() -> None:
    rig = Rig(validation=[5, 6, 4])
    rig.run(total_steps=11, save_steps=5, evaluate_steps=None)
    assert rig.saved == [4, 5, 10, 11]  # best at 4, none at 8, best at 11, which is also the end


def test_early_stopping_ends_with_a_checkpoint_and_stays_ended() -> None:
    rig = Rig(validation=[3, 1, 2, 2, 0])
    assert rig.run(total_steps=100, evaluate_steps=2, patience=2) is Ending.EARLY_STOP
    assert rig.progress.step == 8
    assert rig.saved == [2, 4, 8]
    assert rig.run(total_steps=100, evaluate_steps=2, patience=2) is Ending.EARLY_STOP
    assert len(rig.step.taken) == 8


def test_without_validation_rows_nothing_is_best() -> None:
    rig = Rig()
    assert rig.run(total_steps=4, evaluate_steps=1, patience=1) is Ending.FINISHED
    assert rig.progress.best_step is None
    assert rig.logged("valid", "step") == []


def test_a_stop_saves_and_the_next_run_goes_on_to_the_same_lines() -> None:
    whole = Rig(validation=[5, 4, 3])
    whole.run(total_steps=10, log_steps=4, evaluate_steps=None)
    rig = Rig(validation=[5, 4, 3], stop_at=5)
    assert rig.run(total_steps=10, log_steps=4, evaluate_steps=None) is Ending.STOPPED
    assert rig.progress.step == 6
    assert rig.saved == [4, 6]
    rig.stop_at = None
    rig.validation = [4, 3]
    assert rig.run(total_steps=10, log_steps=4, evaluate_steps=None) is Ending.FINISHED
    assert rig.feed.asked == [Position(0, 0), Position(1, 20)]
    strip = [{k: v for k, v in line.items() if k != "samples_per_second"} for line in rig.lines]
    assert strip == [{k: v for k, v in line.items() if k != "samples_per_second"} for line in whole.lines]


def test_the_time_of_an_interrupted_evaluation_is_not_training_time() -> None:
    def interrupted() -> None:
        time.sleep(0.5)
        raise Stopped

    rig = Rig(before_evaluation=interrupted)
    assert rig.run(total_steps=8, evaluate_steps=4) is Ending.STOPPED
    assert rig.saved == [4]
    assert rig.progress.train_seconds < 0.5


def test_the_steps_before_an_evaluation_that_fails_are_saved() -> None:
    """A user's metric raises after hours of training."""

    def failing() -> None:
        raise UserError("the metric 'mine' failed")

    rig = Rig(before_evaluation=failing)
    with pytest.raises(UserError, match="mine"):
        rig.run(total_steps=8, evaluate_steps=4)
    assert rig.saved == [4]
    assert rig.progress.evaluation_due


def test_the_speed_leaves_the_first_steps_of_a_process_out() -> None:
    """They compile: 40 rows in a second of compilation would be shown as 40 rows a second, and hours left."""
    rig = Rig()
    take = rig.step

    def compiling(batches: Sequence[Any], step: int, *, wants_stop: bool) -> StepResult:
        time.sleep(0.2 if step < WARMUP_STEPS else 0)
        return take(batches, step, wants_stop=wants_stop)

    rig.step = compiling  # type: ignore[assignment]
    rig.run(total_steps=3 + WARMUP_STEPS, log_steps=1)
    rates = rig.logged("train", "samples_per_second")
    assert rates[:WARMUP_STEPS] == [None] * WARMUP_STEPS
    assert all(rate > 100 for rate in rates[WARMUP_STEPS:]), "with the compilation it would be below 50"
    assert rig.progress.train_seconds > 0.2 * WARMUP_STEPS, "the summary counts all of them"


def test_a_stop_at_the_last_step_is_the_end() -> None:
    rig = Rig(stop_at=3)
    assert rig.run(total_steps=4) is Ending.FINISHED


def test_a_finished_run_does_nothing_more() -> None:
    rig = Rig()
    rig.run(total_steps=4)
    assert rig.run(total_steps=4) is Ending.FINISHED
    assert (len(rig.step.taken), rig.saved) == (4, [4])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_and_rows(loss: float) -> None:
    rig = Rig(losses=[1, 1, 1, 1, 1, loss])
    with pytest.raises(TrainingFault, match=r"step 6 \(epoch 2\): the loss is (nan|inf).* rows 11, 12, .*and more"):
        rig.run(total_steps=8, save_steps=4)
    assert rig.saved == [4]


class Patient(Collectives):
    """Numbers arrive when they are asked for, and not before, as from a GPU."""

    def __init__(self) -> None:
        super().__init__(World())
        self.unread = self.most_unread = 0

    def async_to_host(self, *tensors: torch.Tensor) -> Callable[[], list[float]]:
        self.unread += 1
        self.most_unread = max(self.most_unread, self.unread)
        now = super().async_to_host(*tensors)

        def read() -> list[float]:
            self.unread -= 1
            return now()

        return read


def test_steps_sent_ahead_change_nothing_that_is_recorded() -> None:
    intervals = {"total_steps": 23, "log_steps": 5, "save_steps": 9, "evaluate_steps": 7}
    seen = []
    for ahead in (0, 3):
        patient = Patient()
        rig = Rig(validation=[3.0, 2.0, 2.5, 1.0], collectives=patient)
        assert rig.run(**intervals, steps_ahead=ahead) is Ending.FINISHED
        assert (patient.unread, patient.most_unread) == (0, ahead + 1)
        lines = [{k: v for k, v in line.items() if k != "samples_per_second"} for line in rig.lines]
        seen.append((lines, rig.saved))
    assert seen[0] == seen[1]


def test_a_line_waits_for_no_step_after_its_own() -> None:
    """With three steps under way, each line is written after the fourth step from its own has been sent off."""
    rig = Rig(collectives=Patient())
    sent: list[int] = []

    class Lines(list[Any]):
        def append(self, line: Any) -> None:
            sent.append(len(rig.step.taken))
            super().append(line)

    rig.lines = Lines()
    rig.run(total_steps=12, log_steps=2, steps_ahead=3)
    assert rig.logged("train", "step") == [2, 4, 6, 8, 10, 12]
    assert sent == [2, 7, 9, 11, 12, 12]  # all are waited for after the second step, and at the end


def test_a_bad_step_is_named_although_others_were_sent_after_it() -> None:
    rig = Rig(losses=[1, 1, 1, 1, 1, math.nan, 1, 1, 1, 1, 1, 1], collectives=Patient())
    with pytest.raises(TrainingFault, match=r"step 6 \(epoch 2\): the loss is nan.* rows 11, 12, .*and more"):
        rig.run(total_steps=40, steps_ahead=4)
    assert (len(rig.step.taken), rig.saved) == (10, [])


def test_a_vote_is_heard_a_few_steps_later_and_all_steps_before_the_save_are_waited_for() -> None:
    patient = Patient()
    rig = Rig(stop_at=3, collectives=patient)
    assert rig.run(total_steps=40, steps_ahead=4) is Ending.STOPPED
    assert (rig.saved, patient.unread) == ([8], 0)


class VotingStep(FakeStep):
    """Sums the votes over ranks, as the real step does."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__([1.0])
        self.collectives = collectives

    def __call__(self, batches: Sequence[Any], step: int, *, wants_stop: bool) -> StepResult:
        outcome = super().__call__(batches, step, wants_stop=wants_stop)
        self.collectives.all_reduce(outcome.totals)
        return outcome


def one_rank_votes(collectives: Collectives) -> tuple[Ending, int, list[int]]:
    rig = Rig(collectives=collectives, stop_at=3 if collectives.rank == 1 else None)
    rig.step = VotingStep(collectives)
    ending = rig.run(total_steps=50)
    return ending, rig.progress.step, rig.saved


def test_the_vote_of_one_rank_stops_all_at_the_same_step() -> None:
    assert on_ranks(3, one_rank_votes) == [(Ending.STOPPED, 4, [4])] * 3


def test_progress_counts_evaluations_and_survives_json() -> None:
    progress = Progress()
    results: list[bool] = []
    note: Callable[[float], bool] = progress.note_validation
    for step, loss in enumerate([3.0, 2.0, 2.0, math.nan, 1.0]):
        progress.step = step
        results.append(note(loss))
    assert results == [True, True, False, False, True]
    assert (progress.best_step, progress.best_value, progress.evaluations_without_gain) == (4, 1.0, 0)


def test_a_metric_of_its_own_direction_chooses_the_step() -> None:
    rig = Rig(validation=[1, 2, 3, 4], progress=Progress(Selection("auroc", higher_is_better=True)))
    rig.aurocs = [0.6, 0.8, 0.7, 0.75]
    assert rig.run(total_steps=100, evaluate_steps=2, patience=2) is Ending.EARLY_STOP
    assert (rig.progress.best_step, rig.progress.best_value, rig.progress.step) == (4, 0.8, 8)


def test_the_objective_chooses_where_there_is_one_and_else_the_loss() -> None:
    rig = Rig(validation=[5, 4, 6, 7], progress=Progress(Selection("objective")))
    rig.run(total_steps=4, evaluate_steps=1)
    assert (rig.progress.best_step, rig.progress.best_value) == (2, 4)
    assert Selection("objective").value({"loss": 1.0, "objective": 3}) == 3


@pytest.mark.parametrize("value", [None, math.nan, "high", True])
def test_a_metric_that_is_no_number_chooses_nothing(value: Any) -> None:
    rig = Rig(validation=[5], progress=Progress(Selection("auroc", higher_is_better=True)))
    rig.aurocs = [value]
    with pytest.raises(UserError, match=r"train\.select_by: auroc is .* not a number to choose by"):
        rig.run(total_steps=4, evaluate_steps=2)
    assert rig.saved == [2]
    assert rig.lines == []


def test_the_rate_is_reduced_on_a_plateau_and_the_state_keeps_it() -> None:
    progress = Progress(plateau_patience=2)
    seen = []
    for loss in [5, 6, 6, 6, 6, 4, 5, 5]:
        progress.note_validation(loss)
        seen.append(progress.reductions)
    assert seen == [0, 0, 1, 1, 2, 2, 2, 3]
    later = Progress(plateau_patience=2)
    later.load_state_dict(json.loads(json.dumps(progress.state_dict())))
    assert later.state_dict() == progress.state_dict()


def test_a_best_of_another_metric_is_none() -> None:
    progress = Progress()
    progress.step = 3
    progress.note_validation(0.5)
    progress.note_validation(0.7)
    other = Progress(Selection("auroc", higher_is_better=True))
    other.load_state_dict(progress.state_dict())
    assert (other.step, other.best_step, other.best_value, other.evaluations_without_gain) == (3, None, None, 0)
    assert other.note_validation(0.1)


def test_the_state_of_an_earlier_program_was_chosen_by_the_loss() -> None:
    progress = Progress()
    progress.note_validation(0.5)
    old = progress.state_dict()
    del old["selected_by"], old["reductions"]
    old["best_loss"] = old.pop("best_value")
    later = Progress()
    later.load_state_dict(old)
    assert later.state_dict() == progress.state_dict()


@pytest.mark.parametrize(("position", "epoch"), [(Position(0, 10), 1), (Position(1, 0), 1), (Position(1, 10), 2)])
def test_an_epoch_ends_with_its_own_number(position: Position, epoch: int) -> None:
    progress = Progress()
    progress.position = position
    assert progress.epoch_number() == epoch
    assert progress.samples(40) == position.epoch * 40 + position.rows
