"""Time that a process was suspended is told apart from time that it waited."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import HashStore

from dist_train.watchdog import watchdog
from dist_train.watchdog.heartbeat import Heartbeat
from dist_train.watchdog.running_time import RunningTime
from dist_train.watchdog.watchdog import Settings, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_only_a_late_look_comes_after_a_pause() -> None:
    clock = Clock()
    running = RunningTime(0.5, 2.0, clock)
    for seconds, pause in ((0.5, 0), (2.4, 0), (60.5, 60), (0.5, 0), (30.5, 30)):
        clock.now += seconds
        assert running.look() == pytest.approx(pause)
    assert running.of_the_last(10) == pytest.approx(0.5 - 0.5)
    assert running.of_the_last(31) == pytest.approx(1)
    assert running.of_the_last(92) == pytest.approx(2)
    clock.now += 0.5
    assert running.of_the_last(31) == pytest.approx(1)
    assert running.of_the_last(0.25) == 0.25


class Turns:
    """An event whose waits take as long as a story says."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self._clock, self._seconds = clock, seconds

    def wait(self, _seconds: float) -> bool:
        if not self._seconds:
            return True
        self._clock.now += self._seconds.pop(0)
        return False


@pytest.mark.parametrize(
    ("turns", "trips"),
    [
        ([0.5] * 19, False),  # waits for less than the timeout
        ([0.5] * 21, True),
        ([0.5, 3600, *[0.5] * 18], False),  # suspended in a collective
        ([0.5, 3600, *[0.5] * 21], True),  # and then hangs
        ([3600, 7200, 60, *[0.5] * 10], False),
    ],
)
def test_a_pause_counts_for_no_timeout(turns: list[float], trips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tripped, told = Clock(), [], list[float]()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(RunningTime.__init__, "__defaults__", (2.0, clock))
    heartbeat = Heartbeat()
    settings = Settings(timeout_seconds=10.0, exit_code=1, paused=told.append)
    over = Watchdog(0, heartbeat, HashStore(), lambda value: [value], settings)
    monkeypatch.setattr(over, "_ended", Turns(clock, list(turns)))
    monkeypatch.setattr(over, "_trip", lambda **_: tripped.append(True))
    monkeypatch.setattr(over, "_another_has_tripped", lambda: False)
    monkeypatch.setattr(os, "_exit", lambda _code: None)
    with heartbeat.waiting("all_reduce"):
        over._watch()
    assert bool(tripped) is trips
    assert len(told) == (max(turns) > 11)


def test_the_store_is_not_lost_by_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes stop while one asks the store: the answer comes once they go on."""
    over = Watchdog(0, Heartbeat(), HashStore(), lambda value: [value], Settings(timeout_seconds=10.0, exit_code=1))
    monkeypatch.setattr(watchdog, "_ASK_SECONDS", 0.4)
    joins = iter([60.0])
    join = threading.Thread.join

    def paused(thread: threading.Thread, timeout: float | None = None) -> None:
        time.sleep(next(joins, 0.0) and 0.5)  # the clock goes on, and the join has used up its time
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", paused)
    assert over._ask(lambda _store: time.sleep(0.6) or 7) == 7
    assert over._ask(lambda _store: time.sleep(5)) is None


SAYS_IT_ON_A_CLOSED_TERMINAL = """
import os, sys
from torch.distributed import HashStore
from dist_train.watchdog.heartbeat import Heartbeat
from dist_train.watchdog.watchdog import Settings, Watchdog
over = Watchdog(0, Heartbeat(), HashStore(), lambda value: [value], Settings(timeout_seconds=1, exit_code=3))
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
over._trip(timed_out=True, error=None)
assert over._ask(lambda store: store.check(["reported"]))
os._exit(3)
"""


def test_a_closed_terminal_does_not_keep_the_ranks_from_ending() -> None:
    assert subprocess.run([sys.executable, "-c", SAYS_IT_ON_A_CLOSED_TERMINAL], check=False).returncode == 3
