"""Environment -> world: which rank this process is, of how many, on which device, with which backend.

Four ways to start are told apart: torchrun (RANK, WORLD_SIZE, ...), plain `srun` (SLURM_PROCID, ...), a plain
process (a world of one), and a half-set environment, which is an error and never a guess.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dist_train.errors import TrainingFault, UserError
from dist_train.system.console import log
from dist_train.system.torchrun import TORCHRUN_VARIABLES, missing_from_torchrun

SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")

TIMEOUT_GRACE_SECONDS = 10.0
_LONGEST_PAUSE = timedelta(days=365)


@dataclass(frozen=True, kw_only=True)
class World:
    """One process's place among all. `rendezvous` is a torch.distributed init method; empty in a world of one.

    `store` is the one that all ranks share, where they have met already.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "gloo"
    rendezvous: str = ""
    store: Store | None = field(default=None, compare=False, repr=False)


def world_from_environment(
    environ: Mapping[str, str], *, device: str = "auto", backend: str = "auto", timeout_seconds: float = 300.0
) -> World:
    """Read the launcher's variables, and find out whether each rank has a GPU of its own.

    Several ranks on GPUs meet for that, within `timeout_seconds`: a launcher may show each of them one device, the same
    one or another.

    Raises:
        UserError: a variable is missing or contradicts another, or there is no such device or backend.
        TrainingFault: the ranks could not meet.
    """
    if "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ:
        place = _from_slurm(environ)
    elif any(name in environ for name in TORCHRUN_VARIABLES):
        place = _from_torchrun(environ)
    else:
        place = World()
    if not 0 <= place.rank < place.size:
        raise UserError(f"rank {place.rank} does not exist in a world of {place.size}: check RANK and WORLD_SIZE")
    chosen = _device(place, device, backend)
    if chosen.type == "cpu" or backend == "gloo":
        return replace(place, device=chosen)
    store = _meet(place, timeout_seconds) if place.size > 1 else None
    shared = _shared_device(store, place, _device_uuid(chosen), timeout_seconds) if store else []
    if not shared:
        return replace(place, device=chosen, backend="nccl", store=store)
    ranks = " and ".join(str(rank) for rank in shared)
    if backend == "nccl":
        raise UserError(
            f"runtime.backend=nccl needs a GPU for each rank, but ranks {ranks} have the same one; "
            "start as many ranks as there are GPUs, or use runtime.backend=auto or gloo"
        )
    if place.rank == 0:
        log.warning(
            "ranks %s have the same GPU: they communicate by gloo, over the host, and no step becomes a CUDA graph; "
            "as many ranks as GPUs are faster", ranks,
        )  # fmt: skip
    return replace(place, device=chosen, store=store)


def _meet(world: World, timeout_seconds: float) -> Store:
    """The store that all ranks share, once rank 0 has opened it."""
    timeout = timedelta(seconds=timeout_seconds)
    with _meeting(world, timeout_seconds):
        met: tuple[Store, int, int] = next(rendezvous(world.rendezvous, world.rank, world.size, timeout=timeout))
    return met[0]


@contextmanager
def _meeting(world: World, timeout_seconds: float) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise TrainingFault(
            f"rank {world.rank} of {world.size} could not meet the others within {timeout_seconds:g} s: {reason}"
        ) from None


def _shared_device(store: Store, place: World, uuid: str, timeout_seconds: float) -> list[int]:
    """Two ranks that have the same device, the same two on all ranks; empty where each has one of its own.

    Every rank with a GPU takes part, also one that sees more devices than there are ranks, so that all decide alike.
    """
    devices = PrefixStore("device", store)
    devices.set(str(place.rank), uuid)
    keys = [str(rank) for rank in range(place.size)]
    with _meeting(place, timeout_seconds):
        uuids = devices.multi_get(keys)
    rank_of: dict[bytes, int] = {}
    for rank, found in enumerate(uuids):
        other = rank_of.setdefault(found, rank)
        if other != rank:
            return [other, rank]
    return []


def _device_uuid(device: torch.device) -> str:
    """What tells a GPU, or a part of one, from all others, whatever number this process sees it under."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_here(trained_on: str) -> str:
    """`runtime.device` for work on a run that is there: this machine need not be its own, so only `cpu` is kept."""
    return "cpu" if trained_on == "cpu" else "auto"


@contextmanager
def process_group(world: World, timeout_seconds: float) -> Iterator[Store]:
    """Open torch.distributed for a world of several; a world of one needs none. Yields the store that ranks share."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        yield HashStore()
        return
    if world.size == world.local_size and sys.platform == "linux":
        # All ranks are on this host: gloo must neither look up the host's name nor listen to the network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if world.backend == "nccl":
        _prepare_nccl()
    timeout = timedelta(seconds=timeout_seconds)
    store = world.store or _meet(world, timeout_seconds)
    store.set_timeout(timeout)
    with _meeting(world, timeout_seconds):
        dist.init_process_group(
            torch_backend(world),
            store=PrefixStore("process_group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout + timedelta(seconds=TIMEOUT_GRACE_SECONDS),
            device_id=world.device if world.backend == "nccl" else None,
        )
    # The watchdog ends a collective that hangs, and counts no time in which the ranks were suspended. torch's timeout
    # would count it, so it holds only until all ranks have met.
    group = dist.group.WORLD
    assert group is not None  # it was just opened
    group.set_timeout(_LONGEST_PAUSE)
    try:
        yield store
    finally:
        dist.destroy_process_group()


def torch_backend(world: World) -> str:
    """What torch is told: beside NCCL, which takes no tensors of the host, gloo for those that are there."""
    return "cpu:gloo,cuda:nccl" if world.backend == "nccl" else world.backend


def _prepare_nccl() -> None:
    """Set what NCCL and torch's use of it read from the environment, where the user has not."""
    # A record of the last collectives, for the report of a hang; its name changed after torch 2.11.
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        os.environ.setdefault(name, "2000")
    # In a graph NCCL may register its buffers with the network and then sum by another algorithm than it does outside:
    # a resumed run, whose first steps are not recorded, would have other bits than one that was never interrupted.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


def _from_torchrun(environ: Mapping[str, str]) -> World:
    missing = missing_from_torchrun(environ)
    if missing:
        present = [name for name in TORCHRUN_VARIABLES if name in environ]
        raise UserError(
            f"the environment is half set: {', '.join(present)} given, {', '.join(missing)} missing; "
            "start with torchrun, or unset them all to run one process"
        )
    size = _integer(environ, "WORLD_SIZE")
    return World(
        rank=_integer(environ, "RANK"),
        size=size,
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_size=_integer(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else size,
        rendezvous="env://",
    )


def _from_slurm(environ: Mapping[str, str]) -> World:
    missing = [name for name in SLURM_VARIABLES if name not in environ]
    if missing:
        raise UserError(f"started by srun, but {', '.join(missing)} is missing from the environment")
    size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    nodes = _integer(environ, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in environ else 1
    port = 20000 + _integer(environ, "SLURM_JOB_ID") % 10000
    return World(
        rank=_integer(environ, "SLURM_PROCID"),
        size=size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_size=-(-size // nodes),
        rendezvous=f"tcp://{_first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
    )


def _first_host(nodelist: str) -> str:
    """First host of Slurm's compressed notation: `gpu[03-05,9],cpu1` -> `gpu03`, `a[1-2]b[7,8]` -> `a1b7`."""
    shortened = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist)
    host = shortened.split(",")[0].strip()
    if not host or re.search(r"[\[\]\s]", host):
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r} names no host")
    return host


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name}={environ[name]!r} in the environment is not a whole number") from None


def _device(place: World, device: str, backend: str) -> torch.device:
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError("runtime.device=cuda, but torch sees no GPU; use runtime.device=auto or cpu")
    if not gpus:
        if backend == "nccl":
            raise UserError("runtime.backend=nccl, but torch sees no GPU; use runtime.backend=auto or gloo")
        return torch.device("cpu")
    # Of one visible GPU each rank may see another one, as under srun --gpus-per-task=1.
    if backend == "nccl" and 1 < gpus < place.local_size:
        raise UserError(f"runtime.backend=nccl needs a GPU for each of the {place.local_size} ranks here, not {gpus}")
    return torch.device("cuda", place.local_rank % gpus)
