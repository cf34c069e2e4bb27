"""Run a measurement on several gloo ranks of this machine, one thread each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from dist_train.accel.host_memory import use_host_memory
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World, process_group
from dist_train.system.console import leave

TIMEOUT_SECONDS = 300


def on_ranks(world_size: int, measure: Callable[..., Any], *arguments: Any) -> Any:
    """`measure(collectives, *arguments)` on every rank; what rank 0 returned, as JSON types."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world_size, folder, measure, arguments), nprocs=world_size, start_method="spawn")
        return json.loads(Path(folder, "answer.json").read_text())


def _rank(rank: int, world_size: int, folder: str, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    world = World(
        rank=rank, size=world_size, local_rank=rank, local_size=world_size, rendezvous=f"file://{folder}/store"
    )
    with process_group(world, TIMEOUT_SECONDS):
        answer = measure(use_host_memory(Collectives(world)), *arguments)
        if rank == 0:
            Path(folder, "answer.json").write_text(json.dumps(answer))
    leave(0)  # gloo aborts now and then in a normal exit
