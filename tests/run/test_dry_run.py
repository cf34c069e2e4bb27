"""A trial of a session: what it counts, and that the run's own length sets its figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import Stopped
from dist_train.execution.recorded import WARM_UP_STEPS, GpuExecution
from dist_train.run import dry_run, session
from dist_train.run.dry_run import DryRunReport, profile_session
from tests.dist.sessions import BUILTIN, build
from tests.execution.test_recorded import Repeater
from tests.ranks import on_ranks

SMALL = [*BUILTIN, "model.hidden_dim=8", "train.global_batch_size=4096"]


def trial(collectives: Collectives, *more: str) -> DryRunReport:
    return profile_session(build(collectives, [*SMALL, *more]), collectives, lambda: False)


def test_time_to_the_end_is_that_of_all_rows_at_the_rate_that_was_tried() -> None:
    built = build(Collectives(World()), [*SMALL, "train.epochs=30"])
    done = profile_session(built, Collectives(World()), lambda: False)
    assert 3 < done.steps <= 53
    rows = built.feed.num_rows * 30
    assert done.training_seconds * done.rows_per_second == pytest.approx(rows)
    assert done.peak_memory_bytes > 100 * 2**20  # torch alone takes more


def test_a_run_of_two_steps_is_tried_whole() -> None:
    done = trial(Collectives(World()), "train.max_steps=2")
    assert done.steps == 2
    assert done.training_seconds * done.rows_per_second == pytest.approx(2 * 4096)


def on_both(collectives: Collectives) -> DryRunReport:
    return trial(collectives, "train.epochs=3")


def test_all_ranks_say_the_same() -> None:
    first, second = on_ranks(2, on_both)
    assert first.steps == second.steps
    assert first.peak_memory_bytes == second.peak_memory_bytes
    assert first.rows_per_second == second.rows_per_second


def test_a_trial_can_be_stopped() -> None:
    collectives = Collectives(World(), lambda: True)
    with pytest.raises(Stopped):
        profile_session(build(Collectives(World()), SMALL), collectives, lambda: True)


def test_steps_are_timed_once_they_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the first eleven steps are many times slower than the others, and the next is recorded."""
    recorder, choose = Repeater(), session.choose_execution

    def chosen(*arguments: Any, **more: Any) -> GpuExecution:
        return GpuExecution(choose(*arguments, **more), recorder, rows_on_device=True)

    monkeypatch.setattr(session, "choose_execution", chosen)
    monkeypatch.setattr(dry_run, "_SECONDS", 1000.0)
    done = trial(Collectives(World()), "train.global_batch_size=256", "train.epochs=9")
    assert recorder.recordings == 1
    warm_up = done.steps - dry_run._STEPS
    assert warm_up == WARM_UP_STEPS + 2, "the recorded step, and the one in which the vote is taken"
    assert recorder.runs == done.steps - WARM_UP_STEPS


class LikeAGpu(Collectives):
    """Collectives of a rank with a GPU, as far as a dry run asks."""

    def __init__(self) -> None:
        super().__init__(World())
        self.device = torch.device("cuda")

    def async_to_host(self, *wanted: torch.Tensor | float) -> Callable[[], list[float]]:
        return Collectives(World()).async_to_host(*wanted)


def test_on_a_gpu_steps_are_timed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "_LEAST_SECONDS_ON_GPU", 0.5)
    quiet = ["log.every_steps=1", "evaluation.every_steps=1000000"]
    built = build(Collectives(World()), [*SMALL, "train.global_batch_size=64", "train.epochs=50", *quiet])
    steps, rows_per_second = dry_run._train(built, LikeAGpu(), lambda: False)
    assert built.progress.train_seconds >= 0.5
    assert steps > dry_run._STEPS
    assert rows_per_second > 0
