"""The training loop: steps, lines of metrics, evaluations, checkpoints, and the agreed ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from dist_train.distributed.collectives import Collectives
from dist_train.errors import Stopped, TrainingFault, UserError
from dist_train.training.meter import Meter
from dist_train.training.progress import Progress
from dist_train.training.protocols import Batch, DeferredSteps, Feed, Record, Save, Track
from dist_train.training.step import Step, StepResult

T = TypeVar("T")

WARMUP_STEPS = 2
"""First steps of a process, which may compile code: the speed in a line of metrics leaves them out."""


class Ending(Enum):
    """Why the loop returned."""

    FINISHED = "finished"
    EARLY_STOP = "stopped early: the validation no longer improves"
    STOPPED = "stopped on request"


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When what happens, in optimizer steps. `evaluate_steps` None: at the end of each epoch.

    `steps_ahead` may be sent off to a GPU before it is known how the one before them has ended, so that it never waits
    for the host, or be computed together on the CPU. An evaluation and a checkpoint wait for all; a line is written
    once its step is known to be computed, and has the speed of the steps that are by then.
    """

    total_steps: int
    log_steps: int
    save_steps: int
    evaluate_steps: int | None
    patience: int | None
    steps_ahead: int = 0


@dataclass(frozen=True)
class _Line:
    """What a line of metrics has of a step before its numbers are known."""

    record: Record
    learning_rate: float
    timed: bool
    """Whether steps were taken by this process that its speed may be measured by."""


@dataclass(frozen=True)
class _PendingStep:
    """A step that has been sent off; `numbers` gives its totals, gradient norm and whether all were finite."""

    number: int
    epoch: int
    batches: list[Batch]
    rows: int
    numbers: Callable[[], list[float]]
    line: _Line | None


class Loop:
    """Runs `step` over `feed` from where `progress` stands. Every decision is taken alike on every rank.

    `evaluate` gives validation metrics (None: there are no validation rows); `wants_stop` says whether this process was
    asked to stop. `deferred` are the steps where they can be put off.
    """

    def __init__(
        self,
        step: Step,
        feed: Feed,
        progress: Progress,
        meter: Meter,
        intervals: Intervals,
        collectives: Collectives,
        *,
        evaluate: Callable[[], dict[str, Any] | None],
        save: Save,
        track: Track,
        wants_stop: Callable[[], bool],
        deferred: DeferredSteps | None = None,
    ) -> None:
        self.step = step
        self.feed = feed
        self.progress = progress
        self.meter = meter
        self.intervals = intervals
        self.collectives = collectives
        self.evaluate = evaluate
        self.save = save
        self.track = track
        self.wants_stop = wants_stop
        self.deferred = deferred
        self._pending: deque[_PendingStep] = deque()
        self._under_way = 0
        """Steps that were put off, have been sent off, and are not known to be computed: the first of `_pending`."""
        self._clock = time.perf_counter()
        self._rows_timed = 0
        """Of the steps since the speed was measured last."""
        self._seconds_at_line = self.progress.train_seconds
        self._steps_taken = 0
        """By this process."""

    def run(self) -> Ending:
        """Train to the end, or to an agreed stop; a checkpoint of the last step is written in either case."""
        if self.deferred is None or self.intervals.steps_ahead == 0:
            return self._run()
        self.deferred.hold(on=True)
        try:
            return self._run()
        finally:
            self.deferred.hold(on=False)

    def _run(self) -> Ending:
        progress = self.progress
        self._clock = time.perf_counter()
        if progress.evaluation_due and self._evaluate_and_checkpoint(stop=False):
            return Ending.STOPPED
        for batches, position in self.feed.steps(progress.position):
            if self._finished() or self._out_of_patience():
                break
            self.collectives.heartbeat.at_step(progress.step + 1)
            outcome = self.step(batches, progress.step, wants_stop=self.wants_stop())
            numbers = self.collectives.async_to_host(outcome.totals, outcome.grad_norm, outcome.finite)
            epoch = progress.position.epoch
            progress.step += 1
            progress.position = position
            progress.evaluation_due = self._evaluation_due()
            self._steps_taken += 1
            line = self._line(outcome) if self._line_due() else None
            self._pending.append(_PendingStep(progress.step, epoch, batches, outcome.rows, numbers, line))
            stop = self._drain(0 if self._must_synchronize() else self.intervals.steps_ahead)
            if self._steps_taken == WARMUP_STEPS:
                self._restart_speed()
            if self._evaluate_and_checkpoint(stop=stop):
                return Ending.STOPPED
        return Ending.FINISHED if self._finished() else Ending.EARLY_STOP

    def _drain(self, keep: int) -> bool:
        """Find out how steps have ended, of all but the `keep` last ones, and log them; true on a vote to stop.

        TrainingFault where a loss or gradient was not finite. On a vote all steps are waited for.
        """
        stop = False
        lines: list[tuple[_Line, float, float]] = []
        keep = self._settled(keep)
        while len(self._pending) > keep:
            sent = self._pending.popleft()
            loss, weight, votes, norm, finite = sent.numbers()
            if not finite:
                if lines:
                    self._log(lines)
                raise TrainingFault(self._describe_nonfinite(sent, loss / (weight or 1.0), norm))
            self.meter.add(loss, weight)
            self._rows_timed += sent.rows
            if sent.line is not None:
                lines.append((sent.line, self.meter.take_loss(), norm))
            if votes > 0:
                stop, keep = True, self._settled(0)
        if lines:
            self._log(lines)
        return stop

    def _settled(self, keep: int) -> int:
        """How many of the last steps are not to be asked for yet, if it may be up to `keep`."""
        if self.deferred is None:
            return keep
        if keep and len(self._pending) - self._under_way <= keep:
            return len(self._pending)
        settled = self.deferred.settle(wait=keep == 0)
        if settled is None:
            return keep
        self._under_way = settled
        return settled

    def _must_synchronize(self) -> bool:
        warmed_up = self._steps_taken == WARMUP_STEPS
        return warmed_up or self.progress.evaluation_due or self._save_due()

    def _line_due(self) -> bool:
        return self._finished() or self.progress.step % self.intervals.log_steps == 0

    def _save_due(self) -> bool:
        return self.progress.step % self.intervals.save_steps == 0

    def _evaluate_and_checkpoint(self, *, stop: bool) -> bool:
        """What is due after a step: an evaluation, a checkpoint. True when the run is to stop here."""
        progress, improved = self.progress, False
        if progress.evaluation_due:
            try:
                improved = self._validate()
                progress.evaluation_due = False
            except Stopped:
                stop = True
            except UserError:  # of a metric, say: the steps since the last checkpoint are not lost with it
                self._save()
                raise
        done = self._finished() and not progress.evaluation_due
        if self._finished() or stop or improved or self._save_due() or self._out_of_patience():
            self._save()
        return stop and not done

    def _save(self) -> None:
        with self.collectives.heartbeat.phase("checkpointing"):
            self._untimed(lambda: self.save(self.progress.step))

    def _finished(self) -> bool:
        return self.progress.step >= self.intervals.total_steps

    def _out_of_patience(self) -> bool:
        return self.progress.out_of_patience(self.intervals.patience)

    def _evaluation_due(self) -> bool:
        if self.intervals.evaluate_steps is None:
            return self._finished() or self.progress.position.rows == 0
        return self._finished() or self.progress.step % self.intervals.evaluate_steps == 0

    def _validate(self) -> bool:
        metrics = self._untimed(self.evaluate)
        if metrics is None:
            return False
        value = self.progress.selection.value(metrics)
        self.track(self._record("valid") | metrics)
        return self.progress.note_validation(value)

    def _line(self, outcome: StepResult) -> _Line:
        """Of the step that was just sent off."""
        return _Line(self._record("train"), outcome.learning_rate, self._steps_taken > WARMUP_STEPS)

    def _log(self, lines: list[tuple[_Line, float, float]]) -> None:
        """Lines whose steps are computed, each with its mean loss and gradient norm."""
        self._update_clock()
        seconds = self.progress.train_seconds - self._seconds_at_line
        speed = self._rows_timed / max(seconds, 1e-9)
        for line, loss, norm in lines:
            self.track(
                line.record
                | {
                    "loss": loss,
                    "learning_rate": line.learning_rate,
                    "grad_norm": norm,
                    # Of the steps since the lines before, the process's first ones left out; None: there are no others.
                    "samples_per_second": speed if line.timed else None,
                }
            )
        self._restart_speed()

    def _restart_speed(self) -> None:
        """Measure the speed from here on."""
        self._update_clock()
        self._rows_timed = 0
        self._seconds_at_line = self.progress.train_seconds

    def _record(self, split: str) -> Record:
        progress = self.progress
        return {
            "step": progress.step,
            "epoch": progress.epoch_number(),
            "samples": progress.samples(self.feed.num_rows),
            "split": split,
        }

    def _update_clock(self) -> None:
        """Add the time since the clock was last read to the time spent on steps."""
        now = time.perf_counter()
        self.progress.train_seconds += now - self._clock
        self._clock = now

    def _untimed(self, action: Callable[[], T]) -> T:
        """Do something that does not count as time spent on steps."""
        self._update_clock()
        try:
            return action()
        finally:  # an evaluation ends with Stopped when the ranks have agreed to stop
            self._clock = time.perf_counter()

    def _describe_nonfinite(self, sent: _PendingStep, loss: float, norm: float) -> str:
        rows = [row for part in self.collectives.all_gather_object(lambda: _some_rows(sent.batches)) for row in part]
        listed = ", ".join(str(row + 1) for row in rows)
        return (
            f"step {sent.number} (epoch {sent.epoch + 1}): the loss is {loss}, the gradient norm {norm}; no rank has "
            f"updated its weights by it. The step trains on {sent.rows} rows, data rows {listed}"
            f"{' and more' if sent.rows > len(rows) else ''}. "
            "Lower optim.lr, set optim.max_grad_norm, or look at these rows"
        )


def _some_rows(batches: list[Batch], limit: int = 8) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows.tolist()][:limit]
