"""The watch over the ranks, where whole jobs (`tests/resume/test_faults.py`) would need luck to show it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from torch._C._distributed_c10d import HashStore

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.watchdog.heartbeat import STACK_SIGNAL
from dist_train.watchdog.processes import Process
from dist_train.watchdog.watchdog import Watchdog
from tests.patience import PATIENCE_SECONDS

RANK = f"""
import signal, time
signal.signal({STACK_SIGNAL}, lambda *_: None)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(STACK_SIGNAL is None, reason="ranks look at each other by way of /proc")
def test_a_stopped_rank_is_ended_even_if_it_has_not_come_to_stop_again(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives = Collectives(World())
    over = Watchdog(collectives, HashStore(), 60.0, None, None, "")
    with subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE) as stopped:
        assert stopped.stdout
        assert stopped.stdout.readline() == b"ready\n"
        over._ranks = (*over._ranks, Process.of(stopped.pid))
        over._neighbours = {1: os.dup(collectives.heartbeat.handle)}
        os.kill(stopped.pid, signal.SIGSTOP)
        monkeypatch.setattr(Process, "state", lambda _: "stopped")
        assert [other.rank for other in over._unresponsive()] == [1]
        monkeypatch.setattr(Process, "state", lambda _: "running")  # the kernel has not stopped it yet
        over._end_neighbours()
        try:
            assert stopped.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        finally:
            stopped.kill()
    over.end()
