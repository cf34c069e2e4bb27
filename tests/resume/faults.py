"""Jobs in which one rank goes wrong at a chosen place, and what becomes of all of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from dist_train.config.load import load_config
from dist_train.distributed.broadcast import Packed
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.job import train
from dist_train.system.console import run_command
from dist_train.training.step import EagerStep
from tests.patience import PATIENCE_SECONDS
from tests.ranks import _server
from tests.resume.collectives import before_each
from tests.resume.jobs import become

Kind = Literal["raise", "sleep", "kill", "stop", "skip", "ask"]
"""`stop` is SIGSTOP; `skip`: a collective is not taken part in; `ask`: nothing is wrong, the rank gets SIGUSR1."""


@dataclass(frozen=True)
class Fault:
    """`rank` goes wrong at the `nth` collective that it calls for in a phase (`Heartbeat.phase`)."""

    kind: Kind
    rank: int
    phase: str
    nth: int = 1


@dataclass(frozen=True)
class Aftermath:
    """Exit codes (negative: the signal), what was written to stderr, in rank order, and how long it took.

    `step`: the optimizer step in which the fault came, or after which; 0: before the first.
    """

    codes: list[int]
    errors: list[str]
    step: int
    seconds: float
    seconds_after_fault: float


def run_with_fault(arguments: list[str], ranks: int, fault: Fault) -> Aftermath:
    """Run a job of `tests.resume.jobs` until every rank has ended; whatever has not by then is killed."""
    work = Path(arguments[1].removeprefix("run.dir=")) / ".job"
    work.mkdir(parents=True, exist_ok=True)
    store, mark = work / "store", work / "fault"
    logs = [work / f"rank{rank}.log" for rank in range(ranks)]
    processes = [
        _server().Process(target=_rank, args=(arguments, rank, ranks, str(store), str(logs[rank]), fault, str(mark)))
        for rank in range(ranks)
    ]
    begin = time.time()
    for process in processes:
        process.start()
    try:
        alive = {process.sentinel for process in processes}
        while alive:
            ready = wait(list(alive), PATIENCE_SECONDS)
            assert ready, [log.read_text() for log in logs]
            alive -= set(ready)  # type: ignore[arg-type]
        end = time.time()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Aftermath(
        [p.exitcode for p in processes],
        [log.read_text() for log in logs],
        int(mark.read_text()),
        end - begin,
        end - mark.stat().st_mtime,
    )


def _rank(arguments: list[str], rank: int, size: int, store: str, log: str, fault: Fault, mark: str) -> None:
    become(rank, log)
    world = World(rank=rank, size=size, local_rank=rank, local_size=size, rendezvous=f"file://{store}")
    if rank == fault.rank:
        lay(fault, Path(mark))
    run_command(lambda: train(load_config(arguments), world, {}))


def lay(fault: Fault, mark: Path) -> None:
    """Make this process go wrong where the fault says; the step is written to `mark` then."""
    seen = step = 0
    take_step = EagerStep.__call__

    def counted(self: EagerStep, batches: Any, number: int, *, wants_stop: bool) -> Any:
        nonlocal step
        step = number + 1
        return take_step(self, batches, number, wants_stop=wants_stop)

    EagerStep.__call__ = counted  # type: ignore[method-assign]

    def note() -> None:
        mark.write_text(str(step))

    def reached(collectives: Collectives) -> bool:
        nonlocal seen
        if collectives.heartbeat.read().phase != fault.phase:
            return False
        seen += 1
        if seen != fault.nth:
            return False
        note()
        return True

    for name in ("all_reduce", "all_gather", "gather_rows", "all_gather_object", "on_rank_zero"):
        before_each(name, lambda collectives: _go_wrong(fault, note) if reached(collectives) else None)


def _go_wrong(fault: Fault, note: Callable[[], None]) -> None:
    if fault.kind == "raise":
        raise ZeroDivisionError("injected")
    if fault.kind == "sleep":
        time.sleep(PATIENCE_SECONDS)
    elif fault.kind == "skip":
        _skip_one(note)
    elif fault.kind == "ask":
        signal.raise_signal(signal.SIGUSR1)
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)


def _skip_one(note: Callable[[], None]) -> None:
    """The next collective of this rank by way of torch is not taken part in, whichever it is; `note` is called then."""
    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "send", "recv")
    originals = {name: getattr(dist, name) for name in names}

    def skipped(name: str, received: Any) -> None:
        note()
        for other, function in originals.items():
            setattr(dist, other, function)
        # Not whatever the memory held, which may end the run by itself.
        if name == "broadcast":
            Packed((None, None)).send(received.copy_)
        elif name == "recv":
            received.zero_()
        for tensor in received if isinstance(received, list) else []:
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()

    for name in names:
        setattr(dist, name, lambda received, *_, name=name, **_named: skipped(name, received))
