"""Who can ask a process to stop, and how it is told apart from who cannot."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.slurm import Attempt
from dist_train.distributed.stopping import LAUNCHER_DIED, STOP_SIGNALS, Launcher, StopRequest
from dist_train.distributed.world import World
from dist_train.errors import Stopped
from tests.ranks import on_ranks


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert not stop.wanted()
        signal.raise_signal(number)
        assert (stop.wanted(), stop.cause) == (True, number.name)
    assert signal.getsignal(number) is former


@pytest.mark.parametrize(
    ("content", "attempt", "asked"),
    [
        ("", None, True),
        ("", Attempt("12", 3), True),
        ("12.3\n", Attempt("12", 3), True),
        ("12.2\n", Attempt("12", 3), False),
        ("12.3\n", None, False),
    ],
)
def test_a_stop_file_asks_whom_it_names(tmp_path: Path, content: str, attempt: Attempt | None, asked: bool) -> None:
    file, clock = tmp_path / "run" / "stop", Clock()
    stop = StopRequest(file=file, attempt=attempt, clock=clock)
    assert not stop.wanted()
    file.parent.mkdir()
    file.write_text(content)
    assert not stop.wanted()  # it is looked for once a second
    clock.now += 1
    assert stop.wanted() is asked
    assert (stop.cause is not None) is asked


def test_the_time_limit() -> None:
    clock = Clock()
    stop = StopRequest(time_limit_seconds=60, clock=clock)
    clock.now += 59.9
    assert not stop.wanted()
    clock.now += 0.1
    assert (stop.wanted(), stop.cause) == (True, "run.time_limit_minutes is over")


def test_a_dead_launcher_says_more_than_the_signal_that_came_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher()
    stop = StopRequest(launcher=launcher)
    stop.cause = "SIGTERM"
    assert stop.wanted()
    assert stop.cause == "SIGTERM"
    monkeypatch.setattr(launcher, "_process", -1)
    assert stop.wanted()
    assert stop.cause == LAUNCHER_DIED


def one_asks(c: Collectives, asking: int) -> bool:
    voting = Collectives(World(rank=c.rank, size=c.size), lambda: c.rank == asking)
    try:
        voting.raise_if_stop_agreed()
    except Stopped:
        return True
    return False


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_request_is_enough_and_all_hear_it(world_size: int) -> None:
    assert on_ranks(world_size, one_asks, world_size - 1) == [True] * world_size
    assert on_ranks(world_size, one_asks, world_size) == [False] * world_size
