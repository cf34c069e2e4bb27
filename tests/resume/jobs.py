"""Whole training jobs that can be killed at an exact place: ranks are forked with torch already loaded.

A job is `launch/train.py` without its import time: the same configuration, the same `train`, the same exit code. A
`Trap` kills rank 0 at an exact step or file operation; the other ranks are then killed as well, as a node that dies
would do it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from dist_train.config.load import load_config
from dist_train.distributed.world import World
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.job import train
from dist_train.system.console import run_command
from dist_train.training.step import EagerStep
from tests.patience import PATIENCE_SECONDS
from tests.ranks import _server

COMPARED = ("step", "epoch", "samples", "split", "loss")

# Dropout, moving average, early stopping, accumulation and a ragged tail: everything whose state could be forgotten.
TINY_JOB = (
    "data.target=grade",
    "model.hidden_dim=16",
    "optim.lr=0.05",
    "schedule.warmup_steps=5",
    "train.epochs=30",
    "train.global_batch_size=16",
    "train.accumulation_steps=2",
    "train.ema_decay=0.9",
    "train.ema_warmup=false",  # with it the job loses patience before the later traps
    "train.early_stopping_patience=4",
    "checkpoint.every_steps=5",
    "log.every_steps=3",
    "runtime.device=cpu",
    "runtime.timeout_seconds=30",
    "wandb.mode=disabled",
)


@dataclass(frozen=True)
class Trap:
    """Where rank 0 kills itself.

    `step`: before that step is trained. `save`: in that save of this process (from 1) or a later one, before its `nth`
    file operation of `kind` (any kind: an empty text); at an fsync, `tear` first cuts the file to half. `record`:
    nobody dies; the names of the file operations of each save go to this file. `signal`: nobody dies either; before
    `step`, rank `rank` gets this signal, `times` times. `largest_file`: nobody dies; to rank 0 the disk is full as soon
    as a file has this many bytes. `commands`: nobody dies; before a step, rank 0 runs a shell command.
    """

    step: int | None = None
    save: int | None = None
    kind: str = ""
    nth: int = 1
    tear: bool = False
    record: str | None = None
    signal: int = 0
    rank: int = 0
    times: int = 1
    largest_file: int | None = None
    commands: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """Exit codes (negative: the signal) and what was written to stderr, in rank order."""

    codes: list[int]
    errors: list[str]

    @property
    def killed(self) -> bool:
        return self.codes[0] == -signal.SIGKILL


def write_table(path: Path, rows: int = 150, seed: int = 0) -> Path:
    """A small table with a number, a number with missing cells, a text column and a target that can be learned."""
    draw = random.Random(seed)
    lines = ["income,debt,region,grade"]
    for _ in range(rows):
        income, debt = draw.gauss(50, 20), draw.gauss(10, 5)
        region = draw.choice(["north", "south", "west"])
        score = income / 20 - debt / 5 + (region == "west") + draw.gauss(0, 1)
        grade = "low" if score > 1.5 else "middle" if score > 0 else "high"
        lines.append(f"{income:.3f},{'' if draw.random() < 0.1 else f'{debt:.3f}'},{region},{grade}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_job(table: Path, run_dir: Path, *more: str) -> list[str]:
    """Arguments of the tiny job."""
    return [f"data.path={table}", f"run.dir={run_dir.parent}", f"run.name={run_dir.name}", *TINY_JOB, *more]


def run_job(
    arguments: list[str],
    ranks: int = 1,
    trap: Trap | None = None,
    environ: Mapping[str, str] | None = None,
    threads: int = 1,
) -> Ended:
    """Run a job to its end or to its trap; `threads` are torch's in each rank."""
    with tempfile.TemporaryDirectory() as work:  # not on the disk of the run, which may be full or gone
        return _run_job(arguments, ranks, trap, environ or {}, threads, Path(work))


def _run_job(
    arguments: list[str], ranks: int, trap: Trap | None, environ: Mapping[str, str], threads: int, work: Path
) -> Ended:
    store, logs = str(work / "store"), [work / f"rank{rank}.log" for rank in range(ranks)]
    processes = [
        _server().Process(target=_rank, args=(arguments, rank, ranks, store, str(log), trap, environ, threads))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    try:
        alive = {process.sentinel: process for process in processes}
        while alive:
            ready = wait(list(alive), PATIENCE_SECONDS)
            assert ready, f"the job takes longer than {PATIENCE_SECONDS} s: {[log.read_text() for log in logs]}"
            for sentinel in ready:
                if alive.pop(sentinel).exitcode == -signal.SIGKILL:  # type: ignore[call-overload]
                    for other in processes:
                        other.kill()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Ended([p.exitcode for p in processes], [log.read_text() for log in logs])


def finish(arguments: list[str], ranks: int = 1, threads: int = 1) -> dict[str, Any]:
    """Run a job that must succeed; its outcome."""
    ended = run_job(arguments, ranks, threads=threads)
    assert ended.codes == [0] * ranks, ended.errors
    return outcome(folder_of(arguments))


def folder_of(arguments: list[str]) -> Path:
    """The run folder of a tiny job."""
    return Path(arguments[1].removeprefix("run.dir=")) / arguments[2].removeprefix("run.name=")


def outcome(run_dir: Path) -> dict[str, Any]:
    """What must be the same after any interruption."""
    summary = json.loads((run_dir / "summary.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights_sha256": summary["weights_sha256"],
        "steps": summary["steps"],
        "best_step": summary["best_step"],
        "test": summary["test"],
        "lines": [{key: line[key] for key in COMPARED} for line in lines],
    }


def _rank(
    arguments: list[str], rank: int, size: int, store: str, log: str, trap: Trap | None, environ: Mapping[str, str],
    threads: int,
) -> None:  # fmt: skip
    become(rank, log, threads)
    rendezvous = f"file://{store}" if size > 1 else ""
    world = World(rank=rank, size=size, local_rank=rank, local_size=size, rendezvous=rendezvous)
    if trap and rank == trap.rank:
        lay(trap)
    run_command(lambda: train(load_config(arguments), world, environ))


def become(rank: int, log: str, threads: int = 1) -> None:
    """Make this forked process look like a rank that torchrun has started, with its stderr in a file."""
    with Path(log).open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(threads)


def die() -> None:
    """As the kernel's out-of-memory killer, or a power cut as far as this process can tell."""
    os.kill(os.getpid(), signal.SIGKILL)


def lay(trap: Trap) -> None:
    """Make this process die where the trap says."""
    if trap.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trap.largest_file, trap.largest_file))
        return
    if trap.step is not None or trap.commands:
        take_step = EagerStep.__call__

        def step(self: EagerStep, batches: Any, number: int, *, wants_stop: bool) -> Any:
            if number == trap.step and trap.signal:
                for _ in range(trap.times):
                    signal.raise_signal(trap.signal)
            elif number == trap.step:
                die()
            if number in trap.commands:
                subprocess.run(trap.commands[number], shell=True, check=False, capture_output=True)
            return take_step(self, batches, number, wants_stop=wants_stop)

        EagerStep.__call__ = step  # type: ignore[method-assign]
        return
    counted = Operations()
    save = Checkpoints.write
    saves: list[list[str]] = []

    def write(self: Checkpoints, step: int, parts: Any, best_step: int | None) -> None:
        armed = trap.save is not None and len(saves) + 1 >= trap.save
        with counted.watching(trap if armed else None):
            save(self, step, parts, best_step)
        saves.append(counted.seen)
        if trap.record:
            Path(trap.record).write_text(json.dumps(saves))

    Checkpoints.write = write  # type: ignore[method-assign]


class Operations:
    """Counts file operations that change a disk, and can die before one of them.

    Python itself reports them (audit events), whatever function of the code under test makes them; only fsync has no
    event and is wrapped.
    """

    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._watching = False
        self._trap: Trap | None = None
        sys.addaudithook(self._hear)
        fsync = os.fsync

        def counted_fsync(handle: int) -> None:
            self._count("fsync", handle)
            fsync(handle)

        os.fsync = counted_fsync  # type: ignore[assignment]

    def watching(self, trap: Trap | None) -> Operations:
        """Count from here to the end of the block."""
        self._trap = trap
        return self

    def __enter__(self) -> Operations:
        self.seen = []
        self._watching = True
        return self

    def __exit__(self, *_: object) -> None:
        self._watching = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in self.EVENTS:
            self._count(event)

    def _count(self, event: str, handle: int | None = None) -> None:
        if not self._watching:
            return
        self.seen.append(event)
        trap = self._trap
        if trap and event.startswith(trap.kind) and sum(e.startswith(trap.kind) for e in self.seen) == trap.nth:
            status = os.fstat(handle) if handle is not None else None
            if trap.tear and handle is not None and status and stat.S_ISREG(status.st_mode):
                os.ftruncate(handle, status.st_size // 2)
            die()
