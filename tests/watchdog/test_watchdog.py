"""The watch over the ranks, where whole jobs (`tests/resume/test_faults.py`) would need luck to show it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.distributed import HashStore

from dist_train.watchdog import watchdog
from dist_train.watchdog.diagnosis import RankReport
from dist_train.watchdog.heartbeat import STACK_SIGNAL, Heartbeat
from dist_train.watchdog.processes import Process
from dist_train.watchdog.watchdog import Settings, Watchdog, _packed, _unpacked
from tests.patience import PATIENCE_SECONDS

RANK = f"""
import signal, time
signal.signal({STACK_SIGNAL}, lambda *_: None)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(STACK_SIGNAL is None, reason="ranks look at each other by way of /proc")
def test_a_stopped_rank_is_ended_even_if_it_has_not_come_to_stop_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat, settings = Heartbeat(), Settings(timeout_seconds=60.0, exit_code=1)
    over = Watchdog(0, heartbeat, HashStore(), lambda value: [value], settings)
    with subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE) as stopped:
        assert stopped.stdout
        assert stopped.stdout.readline() == b"ready\n"
        over._ranks = (*over._ranks, Process.of(stopped.pid))
        over._neighbours = {1: os.dup(heartbeat.handle)}
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


def test_reports_travel_as_they_are() -> None:
    """They go through the store as JSON."""
    heartbeat = Heartbeat()
    for name in ("all_gather", "all_reduce"):
        with heartbeat.waiting(name):
            pass
    reports = [
        RankReport(rank=3, host="a", process=7, activity=heartbeat.read(), process_state="stopped", error="no"),
        RankReport(rank=4, host="b", process=8),
    ]
    assert _unpacked(_packed(reports).encode()) == reports


@pytest.mark.parametrize("name", ["_dump_fr_trace_json", "_dump_nccl_trace_json"])
def test_the_flight_recorder_is_found_under_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13 has renamed it."""
    for known in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        monkeypatch.delattr(torch._C._distributed_c10d, known, raising=False)
    monkeypatch.setattr(watchdog.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(watchdog.dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert watchdog._nccl_flight() == ""

    def dump(*, includeCollectives: bool, onlyActive: bool) -> bytes:  # noqa: N803
        return f"{includeCollectives} {onlyActive}".encode()

    monkeypatch.setattr(torch._C._distributed_c10d, name, dump, raising=False)
    assert watchdog._nccl_flight() == "True True"
