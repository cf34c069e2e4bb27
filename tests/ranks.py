"""Run a function on several gloo ranks in real processes, forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing as mp
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Any

import torch
import torch.distributed as dist

from dist_train.accel.host_memory import use_host_memory
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World, process_group
from tests.patience import PATIENCE_SECONDS

_PRELOADED = [
    "torch",
    "torch.distributed",
    "dist_train.run.job",
    "dist_train.run.scoring.predictor",
    # These are loaded by the first step and the first evaluation: seconds of each rank of each job.
    "torch._dynamo",
    "sklearn.metrics",
    "tests.compiled",
]


def preload(module: str) -> None:
    """Have ranks find a module loaded; called where a test module is imported, so that no rank has started yet."""
    if module not in _PRELOADED:
        _PRELOADED.append(module)


@cache
def _server() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(collectives, *arguments)` on every rank; what each returned, in rank order.

    `function` must be importable (a module's own function). A failure on any rank fails the test with its traceback.
    """
    if world_size == 1:
        return [function(Collectives(World()), *arguments)]
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'store'}"
        return in_processes(world_size, _with_collectives, world_size, rendezvous, function, arguments)


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(number, *arguments)` in processes of their own, from 0; what each returned, in their order.

    `function` must be importable. A failure in any of them fails the test with its traceback.
    """
    pipes, processes = [], []
    for number in range(count):
        ours, theirs = mp.Pipe(duplex=False)
        process = _server().Process(target=_process, args=(theirs, number, function, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        answers = [_answer(pipe, number) for number, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    failures = [f"rank {number}: {text}" for number, (ok, text) in enumerate(answers) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


def free_port() -> int:
    """A TCP port of this machine on which nothing listens."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _answer(pipe: Connection, rank: int) -> tuple[bool, Any]:
    if not pipe.poll(PATIENCE_SECONDS):
        return False, f"no answer within {PATIENCE_SECONDS} s"
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return False, f"rank {rank} died without an answer"


def _process(pipe: Connection, number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        answer = True, function(number, *arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send(answer)
    pipe.close()


def _with_collectives(
    rank: int, world_size: int, rendezvous: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    world = World(rank=rank, size=world_size, local_rank=rank, local_size=world_size, rendezvous=rendezvous)
    with process_group(world, PATIENCE_SECONDS):
        dist.barrier()  # a function without collectives must not end before the others have connected
        return function(use_host_memory(Collectives(world)), *arguments)
