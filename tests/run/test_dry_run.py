"""A trial of a session: what it counts, and that the run's own length sets its figures."""

from __future__ import annotations

import pytest

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import Stopped
from dist_train.run.dry_run import DryRunReport, profile_session
from tests.dist.sessions import BUILTIN, build
from tests.ranks import on_ranks

SMALL = [*BUILTIN, "model.hidden_dim=8", "train.global_batch_size=4096"]


def trial(collectives: Collectives, *more: str) -> DryRunReport:
    return profile_session(build(collectives, [*SMALL, *more]), collectives, lambda: False)


def test_time_to_the_end_is_that_of_all_rows_at_the_rate_that_was_tried() -> None:
    session = build(Collectives(World()), [*SMALL, "train.epochs=30"])
    done = profile_session(session, Collectives(World()), lambda: False)
    assert 3 < done.steps <= 53
    rows = session.feed.num_rows * 30
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
