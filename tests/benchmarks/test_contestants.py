"""What the benchmark counts, not how fast it is."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from benchmarks import contestants, workload
from benchmarks.contestants import Clock, Ours
from benchmarks.report import measured, take_turns
from dist_train.distributed.collectives import Collectives
from dist_train.run.session import Session
from dist_train.tasks.tabular import TabularTask
from tests.ranks import on_ranks

CPU = torch.device("cpu")


def test_operations_of_a_row_are_those_of_a_training_step_of_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    features, targets = workload.rows_and_targets(32)
    model = workload.model()
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(features), targets).backward()
    assert counter.get_total_flops() == 32 * workload.flops_per_row()


def test_all_batch_sizes_divide_the_rows() -> None:
    assert [workload.NUM_ROWS % size for size in workload.BATCH_SIZES] == [0] * 5


def test_a_clock_leaves_out_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(5.0, CPU)
    taken = [100.0, 10.0, 2.0, 2.0, 2.0, 2.0]
    finished = []
    for seconds in taken:
        now[0] += seconds
        finished.append(clock.finished(8))
    # Two first steps, then four, which take eight seconds.
    assert finished.index(True) == 5
    assert clock.rate == 8 * 4 / 8.0


def test_everybody_begins_a_round_in_turn() -> None:
    order: list[str] = []
    racers = {name: lambda name=name: float(order.append(name) or 1) for name in "abc"}
    assert take_turns(racers, 2) == {"a": [1, 1], "b": [1, 1], "c": [1, 1]}
    assert "".join(order) == "abcbca"
    assert measured([3, 1, 2]) == {"median": 2, "spread": 3, "values": [3, 1, 2]}


@pytest.mark.parametrize("name", ["tutorial", "accelerate", "lightning"])
def test_a_peer_trains_the_model_to_something(name: str) -> None:
    if name != "tutorial" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make bench installs it")
    features, targets = workload.rows_and_targets(256)
    assert getattr(contestants, name)(features, targets, 32, CPU)(0.0) > 0


def bounded(collectives: Collectives) -> tuple[int, float]:
    config = workload.configuration(64)
    session = Session(config, TabularTask(config, workload.dataset(256, CPU), collectives), collectives)
    rate = Ours(session, collectives)(0.0)
    return session.progress.step, rate


@pytest.mark.parametrize("ranks", [1, 2])
def test_our_turn_is_bounded_on_all_ranks_alike(ranks: int) -> None:
    done = on_ranks(ranks, bounded)
    steps = {step for step, _ in done}
    assert len(steps) == 1
    # Compiled steps are put off and taken together: a turn ends with a whole group of them.
    assert contestants.WARM_UP_STEPS + contestants.FEWEST_STEPS <= steps.pop() < 40
    assert all(rate > 0 for _, rate in done)
