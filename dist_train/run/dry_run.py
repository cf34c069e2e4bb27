"""Measure a run before it is started: a few steps and an evaluation on a session that is discarded. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_train.distributed.collectives import Collectives
from dist_train.run.checkpoint.state import encode_parts
from dist_train.run.session import Session, build_loop
from dist_train.system.machine import mapped_memory_bytes, peak_memory_bytes
from dist_train.training.evaluation import evaluate
from dist_train.training.protocols import Ragged, Record, Rows

# The first steps allocate, and on a GPU are recorded; after that, this many steps or seconds, whichever ends first.
_WARM_UP_STEPS = 3
_STEPS = 50
_SECONDS = 3.0
# Steps of a GPU are timed for a second at least: 50 of them may take 10 ms, of which the host waits for the last ones.
_LEAST_SECONDS_ON_GPU = 1.0
# Rows that are really evaluated, and what each row beyond them takes for a class: probabilities and copies of them in
# the metrics. Measured on 2^18 to 2^22 rows of 3 classes: 104 bytes a row.
_EVALUATED_ROWS = 1 << 18
_BYTES_OF_A_PROBABILITY = 40


@dataclass(frozen=True, kw_only=True)
class DryRunReport:
    """What a run will take: the most memory of a rank, rows per second of training, seconds.

    On CUDA the memory is that of its device, with what other processes hold there.
    """

    steps: int
    peak_memory_bytes: int
    rows_per_second: float
    training_seconds: float
    evaluation_seconds: float

    def lines(self) -> Iterator[str]:
        """The report in words."""
        yield (
            f"peak       about {self.peak_memory_bytes / 2**20:,.0f} MiB a rank, with all that Python and torch take "
            f"(tried with {self.steps} steps)"
        )
        yield (
            f"speed      about {self.rows_per_second:,.0f} rows/s: {self.training_seconds:,.0f} s of training and "
            f"{self.evaluation_seconds:,.0f} s of evaluations from the first step to the end"
        )


def profile_session(session: Session, collectives: Collectives, wants_stop: Callable[[], bool]) -> DryRunReport:
    """Train and evaluate a little, on all ranks alike. The session is of no use afterwards.

    Raises Stopped when the ranks have agreed to stop, TrainingFault where the run itself would.
    """
    mapped = mapped_memory_bytes()
    steps, rows_per_second = _train(session, collectives, wants_stop)
    rows = {name: len(session.task.splits[name]) for name in ("valid", "test")}
    rows_a_second = _evaluate(session, session.task.splits["valid"], collectives)
    tensors = session.tensor_parts()
    if collectives.is_main:
        for _ in encode_parts(tensors).values():
            pass  # what a checkpoint takes in memory
    unseen = max(0, *(count - _EVALUATED_ROWS for count in rows.values()))
    classes = len(session.task.class_names)
    on_device = collectives.device.type == "cuda"  # metrics are computed on the host

    def most_memory() -> int:
        if on_device:
            return peak_memory_bytes(collectives.device)
        # The dry run has touched some pages of a store, and the run will touch all.
        touched = mapped_memory_bytes() - mapped
        whole = sum(split.mapped_bytes for split in session.task.splits.values())
        return peak_memory_bytes(collectives.device) + max(0, whole - touched)

    peak = max(collectives.all_gather_object(most_memory))
    every = session.config.evaluation.every_steps or session.feed.steps_per_epoch
    evaluated = -(-session.total_steps // every) * rows["valid"] + sum(rows.values())
    return DryRunReport(
        steps=steps,
        peak_memory_bytes=peak + (0 if on_device else unseen * classes * _BYTES_OF_A_PROBABILITY),
        rows_per_second=rows_per_second,
        training_seconds=_rows_to_train(session) / rows_per_second,
        evaluation_seconds=evaluated / rows_a_second if rows_a_second else 0.0,
    )


def _train(session: Session, collectives: Collectives, wants_stop: Callable[[], bool]) -> tuple[int, float]:
    """Steps that were tried, and rows per second after the first ones; the slowest rank's, since all wait for it."""
    progress, num_rows = session.progress, session.feed.num_rows

    def loop_until(enough: Callable[[], bool]) -> None:
        def asked() -> bool:
            return wants_stop() or enough()

        build_loop(session.config, session, collectives, save=_no_save, track=_no_track, wants_stop=asked).run()
        collectives.raise_if_stop_agreed()

    loop_until(lambda: progress.step + 1 >= _WARM_UP_STEPS and session.execution.settled)
    start = time.perf_counter()
    seconds, samples = progress.train_seconds, progress.samples(num_rows)
    least = _LEAST_SECONDS_ON_GPU if collectives.device.type == "cuda" else 0.0
    if session.trains_on:
        until = progress.step + _STEPS

        def tried() -> bool:
            enough = progress.step + 1 >= until and progress.train_seconds - seconds >= least
            return enough or time.perf_counter() - start >= _SECONDS

        loop_until(tried)
    if progress.samples(num_rows) == samples:  # the run has no more steps than these
        seconds, samples = 0.0, 0
    rate = (progress.samples(num_rows) - samples) / max(progress.train_seconds - seconds, 1e-9)
    return progress.step, min(collectives.all_gather_object(lambda: rate))


def _evaluate(session: Session, rows: Rows, collectives: Collectives) -> float:
    """Rows per second of an evaluation on the first rows of a split; 0 when there are none."""
    batch_size = session.config.evaluation.batch_size

    def evaluate_first(count: int) -> float:
        kind = _FirstOfLengths if isinstance(rows, Ragged) else _First
        first, start = kind(rows, count), time.perf_counter()
        evaluate(session.scored, first, session.task, batch_size, collectives)
        return len(first) / (time.perf_counter() - start)

    evaluate_first(1)  # loads what computes the metrics
    rate = evaluate_first(_EVALUATED_ROWS)
    return min(collectives.all_gather_object(lambda: rate))


class _First:
    """The first rows of others."""

    def __init__(self, rows: Rows, count: int) -> None:
        self._rows = rows
        self.targets = rows.targets[:count]
        self.weights = None if rows.weights is None else rows.weights[:count]

    def __len__(self) -> int:
        return len(self.targets)

    def slice(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return self._rows.slice(start, stop)


class _FirstOfLengths(_First):
    """Those of rows that have lengths."""

    def __init__(self, rows: Any, count: int) -> None:
        super().__init__(rows, count)
        self.lengths, self.padded_lengths = rows.lengths[:count], rows.padded_lengths[:count]
        self.inputs = rows.inputs


def _rows_to_train(session: Session) -> int:
    """Rows of all steps of the run."""
    epochs, steps = divmod(session.total_steps, session.feed.steps_per_epoch)
    return epochs * session.feed.num_rows + steps * session.config.train.global_batch_size


def _no_save(_step: int) -> None:
    """A dry run leaves no checkpoint."""


def _no_track(_record: Record) -> None:
    """A dry run leaves no metrics."""
