"""The training loop: steps, lines of metrics, evaluations, checkpoints, and the agreed ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from dist_train.errors import TrainingFault
from dist_train.runtime.collectives import Collectives
from dist_train.training.meter import Meter
from dist_train.training.parts import Batch, Feed, Record, Save, Track
from dist_train.training.progress import Progress
from dist_train.training.step import Outcome, Step

T = TypeVar("T")


class Ending(Enum):
    """Why the loop returned."""

    FINISHED = "finished"
    EARLY_STOP = "stopped early: the validation loss no longer improves"
    STOPPED = "stopped on request"


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """When what happens, in optimizer steps. `evaluate_steps` None: at the end of each epoch."""

    total_steps: int
    log_steps: int
    save_steps: int
    evaluate_steps: int | None
    patience: int | None


class Loop:
    """Runs `step` over `feed` from where `progress` stands. Every decision is taken alike on every rank.

    `evaluate` gives validation metrics (None: there are no validation rows); `after_update` is called once a step
    has been taken (moving average); `wants_stop` says whether this process was asked to stop.
    """

    def __init__(
        self,
        step: Step,
        feed: Feed,
        progress: Progress,
        meter: Meter,
        rhythm: Rhythm,
        collectives: Collectives,
        *,
        evaluate: Callable[[], dict[str, Any] | None],
        save: Save,
        track: Track,
        after_update: Callable[[], None],
        wants_stop: Callable[[], bool],
    ) -> None:
        self.step = step
        self.feed = feed
        self.progress = progress
        self.meter = meter
        self.rhythm = rhythm
        self.collectives = collectives
        self.evaluate = evaluate
        self.save = save
        self.track = track
        self.after_update = after_update
        self.wants_stop = wants_stop
        self._clock = time.perf_counter()
        self._samples_at_line = self.progress.samples(self.feed.num_rows)
        self._seconds_at_line = self.progress.train_seconds

    def run(self) -> Ending:
        """Train to the end, or to an agreed stop; a checkpoint of the last step is written in either case."""
        progress, rhythm = self.progress, self.rhythm
        self._clock = time.perf_counter()
        saved = progress.step
        for batches, position in self.feed.steps(progress.position):
            if progress.step >= rhythm.total_steps or self._out_of_patience():
                break
            outcome = self.step(batches, progress.step, wants_stop=self.wants_stop())
            if not outcome.finite.item():
                raise TrainingFault(self._blame(outcome, batches))
            progress.step += 1
            progress.position = position
            self.meter.add(outcome)
            self.after_update()
            finished = progress.step >= rhythm.total_steps
            if finished or progress.step % rhythm.log_steps == 0:
                self._log(outcome)
            improved = self._evaluation_due(finished) and self._validate()
            stop = outcome.totals[2].item() > 0
            if finished or stop or improved or self._out_of_patience() or progress.step % rhythm.save_steps == 0:
                self._aside(lambda: self.save(progress.step))
                saved = progress.step
            if stop and not finished:
                return Ending.STOPPED
        if saved != progress.step:
            self._aside(lambda: self.save(progress.step))
        return Ending.FINISHED if progress.step >= rhythm.total_steps else Ending.EARLY_STOP

    def _out_of_patience(self) -> bool:
        return self.progress.out_of_patience(self.rhythm.patience)

    def _evaluation_due(self, finished: bool) -> bool:
        if self.rhythm.evaluate_steps is None:
            return finished or self.progress.position.rows == 0
        return finished or self.progress.step % self.rhythm.evaluate_steps == 0

    def _validate(self) -> bool:
        metrics = self._aside(self.evaluate)
        if metrics is None:
            return False
        self.track(self._record("valid") | metrics)
        return self.progress.note_validation(metrics["loss"])

    def _log(self, outcome: Outcome) -> None:
        self._tick()
        samples = self.progress.samples(self.feed.num_rows)
        seconds = self.progress.train_seconds - self._seconds_at_line
        self.track(
            self._record("train")
            | {
                "loss": self.meter.take_loss(),
                "learning_rate": outcome.learning_rate,
                "grad_norm": outcome.grad_norm.item(),
                "samples_per_second": (samples - self._samples_at_line) / max(seconds, 1e-9),
            }
        )
        self._samples_at_line, self._seconds_at_line = samples, self.progress.train_seconds

    def _record(self, split: str) -> Record:
        progress = self.progress
        return {
            "step": progress.step,
            "epoch": progress.epoch_number(),
            "samples": progress.samples(self.feed.num_rows),
            "split": split,
        }

    def _tick(self) -> None:
        """Add the time since the clock was last read to the time spent on steps."""
        now = time.perf_counter()
        self.progress.train_seconds += now - self._clock
        self._clock = now

    def _aside(self, action: Callable[[], T]) -> T:
        """Do something that does not count as time spent on steps."""
        self._tick()
        result = action()
        self._clock = time.perf_counter()
        return result

    def _blame(self, outcome: Outcome, batches: list[Batch]) -> str:
        rows = [row for part in self.collectives.agree(lambda: _some_rows(batches)) for row in part]
        listed = ", ".join(str(row + 1) for row in rows)
        loss = (outcome.totals[0] / outcome.totals[1]).item()
        return (
            f"step {self.progress.step + 1} (epoch {self.progress.position.epoch + 1}): the loss is {loss}, the "
            f"gradient norm {outcome.grad_norm.item()}; no rank has updated its weights. The step trains on "
            f"{outcome.rows} rows, data rows {listed}{' and more' if outcome.rows > len(rows) else ''}. "
            "Lower optim.lr, set optim.max_grad_norm, or look at these rows"
        )


def _some_rows(batches: list[Batch], limit: int = 8) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows.tolist()][:limit]
