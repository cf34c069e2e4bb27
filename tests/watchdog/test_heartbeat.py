"""The record of a rank: what it says while things go well, after a failure, and to another process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from dist_train.watchdog.heartbeat import STACK_SIGNAL, Heartbeat, read
from tests.commands import REPOSITORY, environment
from tests.patience import wait_until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc and real-time signals")


def test_phases_steps_and_collectives() -> None:
    heartbeat = Heartbeat()
    assert (heartbeat.read().phase, heartbeat.read().step, heartbeat.read().collective) == ("starting", None, None)
    with heartbeat.phase("training"):
        heartbeat.at_step(7)
        with heartbeat.phase("evaluation"), heartbeat.waiting("all_gather"):
            inside = heartbeat.read()
        after = heartbeat.read()
    place = f"all_gather in {__name__}.test_phases_steps_and_collectives, line "
    assert (inside.phase, inside.step, inside.count) == ("evaluation", 7, 1)
    assert inside.collective is not None
    assert inside.collective.startswith(place)
    assert (after.phase, after.step, after.collective, after.count) == ("training", 7, None, 1)
    assert heartbeat.read().phase == "starting"


def test_after_a_failure_it_says_where_it_was() -> None:
    heartbeat = Heartbeat()
    with pytest.raises(RuntimeError), heartbeat.phase("evaluation"), heartbeat.waiting("all_reduce"):
        raise RuntimeError
    assert heartbeat.read().phase == "evaluation"
    assert heartbeat.read().collective is not None


def test_the_trail_is_the_last_collectives_in_order() -> None:
    heartbeat = Heartbeat()
    for number in range(1000):
        with heartbeat.waiting(f"c{number}"):
            pass
    history = [name.split(" in ")[0] for name in heartbeat.read().history]
    assert history == [f"c{number}" for number in range(1000 - len(history), 1000)]
    assert len(history) >= 32


def test_in_a_backward_pass_only_autograd_itself_waits() -> None:
    heartbeat, seen = Heartbeat(), []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(_context: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(_context: object, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(heartbeat.read().collective)  # a Python function: it computes, or hangs, on its own account
            return gradient

    x = torch.ones((), requires_grad=True)
    with heartbeat.backward("gradients"):
        Probe.apply(x).backward()  # type: ignore[no-untyped-call]
    assert seen == [None]
    assert heartbeat.read().collective is None


def test_in_a_backward_pass_autograd_itself_waits() -> None:
    """As DistributedDataParallel does in it; seen from another thread, as the watchdog sees it."""
    heartbeat, seen, done = Heartbeat(), set(), threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            seen.add(heartbeat.read().collective)

    x = torch.ones(400, 400, requires_grad=True)
    y = x
    for _ in range(200):
        y = y @ x
    thread = threading.Thread(target=look)
    with heartbeat.backward("gradients"):
        thread.start()
        y.sum().backward()  # type: ignore[no-untyped-call]
        done.set()
        thread.join()
    assert "gradients" in seen


def test_memory_is_made_for_another_process_only() -> None:
    """A world of one that merely counts opens no file."""
    lowest = os.open(os.devnull, os.O_RDONLY)  # the number that the next file gets
    os.close(lowest)
    heartbeat = Heartbeat()
    with heartbeat.phase("training"), heartbeat.waiting("all_reduce"):
        another = os.open(os.devnull, os.O_RDONLY)
        os.close(another)
        assert another == lowest
        handle = heartbeat.handle
        assert read(handle).phase == "training"
        assert read(handle).collective == heartbeat.read().collective is not None
        heartbeat.at_step(3)
        assert (read(handle).step, read(handle).count) == (3, 1)


CHILD = """
import os, sys, time
from dist_train.watchdog.heartbeat import Heartbeat
heartbeat = Heartbeat()
heartbeat.keep_stacks()
heartbeat.enter("all_reduce")
def stuck(): {body}
stuck()
"""


@LINUX
@pytest.mark.parametrize("body", ["time.sleep(60)", "os.abort()"])
def test_another_process_reads_it_when_it_hangs_and_when_it_has_died(body: str) -> None:
    program = CHILD.replace("{body}", f"print(heartbeat.handle, flush=True); sys.stdin.read(1); {body}")
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        memory = os.open(f"/proc/{child.pid}/fd/{int(child.stdout.readline())}", os.O_RDONLY)
        child.stdin.write("x")
        child.stdin.flush()
        if "sleep" in body:
            os.kill(child.pid, STACK_SIGNAL or 0)
        wait_until(lambda: "in stuck" in read(memory).stack, "the stack", lambda: read(memory))
        child.kill()
        child.wait()
    found = read(memory)
    os.close(memory)
    assert (found.count, found.phase) == (1, "starting")
    assert found.collective is not None
    assert ("Fatal Python error: Aborted" in found.stack) == ("abort" in body)


def test_its_own_stacks_are_those_of_all_threads() -> None:
    heartbeat, end = Heartbeat(), threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    os.lseek(heartbeat.handle, 0, os.SEEK_END)
    heartbeat.dump_stacks()
    end.set()
    thread.join()
    assert heartbeat.read().stack.count("most recent call first") >= 2
    assert "test_its_own_stacks" in heartbeat.read().stack
