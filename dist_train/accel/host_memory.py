"""Small tensors of all ranks of one host, exchanged by way of memory that they share.

A message between two processes by way of gloo takes some 0.3 ms, threads that wait for each other and a scheduler that
moves them about; a step of a small network takes not much longer. Here a rank writes its part, then a stamp, and looks
at the stamps of the others until all are there.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.distributed.collectives import Collectives
from dist_train.watchdog.processes import Process

CAPACITY = 1 << 20
"""Bytes that a rank can exchange in one call; gloo is as good for more."""

# A rank that is ready looks for the others without a pause for so long, if each has a processor, and then in naps.
_SPIN_SECONDS = 0.002
_NAP_SECONDS = 0.00005
_LOOK_SECONDS = 0.1

_LENGTH_BITS = 24  # of a stamp, for the length in bytes and the kind of the call; the rest is the number of the call
_MAX_VIEWS = 256  # a step has a few shapes, but the pieces of a large table may have any
_STAMP_BYTES = 64  # a cache line of its own for each rank


def use_host_memory(collectives: Collectives) -> Collectives:
    """Have small tensors go through memory that the ranks share, where all ranks are processes of this host on the CPU.

    Elsewhere nothing changes. The memory is opened when it is first needed. Returns `collectives`.
    """
    if 1 < collectives.size == collectives.local_size and collectives.device.type == "cpu":
        collectives.transport = HostMemory(collectives)
    return collectives


class HostMemory:
    """A `Transport` for tensors of up to CAPACITY bytes together; for none where the ranks cannot share memory."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._opened = False
        self._exchange: Exchange | None = None

    def takes(self, *tensors: Tensor) -> bool:
        """Whether they fit; the first call that does opens the memory, on all ranks together."""
        if sum(_bytes_of(tensor) for tensor in tensors) > CAPACITY:
            return False
        if not self._opened:
            collectives = self._collectives
            self._exchange = open_exchange(collectives.rank, collectives.size, collectives.all_gather_object)
            self._opened = True
        return self._exchange is not None

    def all_reduce(self, *tensors: Tensor) -> None:
        """The sum of each over the ranks, in place, in the order of the ranks: the same bits on each."""
        assert self._exchange is not None  # `takes`
        self._exchange.all_reduce(*tensors)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked in their order: (...) -> (size, ...)."""
        assert self._exchange is not None  # `takes`
        return self._exchange.all_gather(tensor)


class Exchange:
    """Memory of all ranks. All of them must make the same calls in the same order.

    Each rank has two buffers, used in turn. A rank that writes to one of them again has seen in the call between that
    all ranks are done with it.
    """

    def __init__(self, rank: int, processes: Sequence[Process], handle: int) -> None:
        self._rank = rank
        self._processes = processes
        self._count = 0
        size = len(processes)
        memory = mmap.mmap(handle, _bytes_for(size))
        stamps = memoryview(memory)[: 2 * size * _STAMP_BYTES].cast("q")
        each = _STAMP_BYTES // 8
        # Of each place and rank: where its stamp is.
        self._stamps = stamps
        self._at = [[(place * size + r) * each for r in range(size)] for place in range(2)]
        self._buffers = torch.frombuffer(memory, dtype=torch.uint8, offset=2 * size * _STAMP_BYTES)
        self._buffers = self._buffers.view(2, size, CAPACITY)
        self._views: dict[tuple[Any, ...], _Views] = {}
        self._spins = size <= len(os.sched_getaffinity(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked in their order: (...) -> (size, ...)."""
        (every,) = self._meet([tensor], 0)
        return every.clone()

    def all_reduce(self, *tensors: Tensor) -> None:
        """The sum of each over the ranks, in place, in the order of the ranks: the same bits on each."""
        for tensor, every in zip(tensors, self._meet(tensors, 1), strict=True):
            torch.sum(every, 0, out=tensor)

    def _meet(self, tensors: Sequence[Tensor], kind: int) -> Sequence[Tensor]:
        """Of each tensor every rank's, (size, ...), good until the call after the next."""
        place = self._count % 2
        self._count += 1
        key = (place, *[(tensor.shape, tensor.dtype) for tensor in tensors])
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            views = self._views[key] = self._views_for(place, tensors)
        for own, tensor in zip(views.own, tensors, strict=True):
            own.copy_(tensor.detach())
        # Ranks that are out of step do not see each other's stamps: they wait, and the watchdog trips.
        stamp = (self._count << _LENGTH_BITS) + 2 * views.num_bytes + kind
        at = self._at[place]
        self._stamps[at[self._rank]] = stamp
        missing = [r for r, where in enumerate(at) if self._stamps[where] != stamp]
        if missing:
            self._wait(missing, at, stamp)
        return views.all

    def _views_for(self, place: int, tensors: Sequence[Tensor]) -> _Views:
        every, start = [], 0
        for tensor in tensors:
            numbers = self._buffers[place, :, start : start + tensor.nbytes].view(tensor.dtype)
            every.append(numbers.unflatten(1, tensor.shape) if tensor.ndim else numbers.squeeze(1))
            start += _bytes_of(tensor)
        return _Views([of_all[self._rank] for of_all in every], every, sum(tensor.nbytes for tensor in tensors))

    def _wait(self, missing: list[int], at: list[int], stamp: int) -> None:
        stamps, start = self._stamps, time.perf_counter()
        looked = start
        while missing:
            missing = [r for r in missing if stamps[at[r]] != stamp]
            now = time.perf_counter()
            if self._spins and now - start < _SPIN_SECONDS:
                continue
            if now - looked > _LOOK_SECONDS:
                looked = now
                gone = [r for r in missing if self._processes[r].state() == "gone"]
                # It may have come here before it left.
                gone = [r for r in gone if stamps[at[r]] != stamp]
                if gone:
                    raise dist.DistNetworkError(f"rank {gone[0]} is gone")
            if missing:
                time.sleep(_NAP_SECONDS)


class _Views(NamedTuple):
    own: Sequence[Tensor]
    all: Sequence[Tensor]
    num_bytes: int


def _bytes_of(tensor: Tensor) -> int:
    """How much of CAPACITY a tensor takes: where the next one begins, numbers of any type can."""
    return -(-tensor.nbytes // 8) * 8


def open_exchange(rank: int, size: int, share: Callable[[Callable[[], Any]], Sequence[Any]]) -> Exchange | None:
    """Memory for ranks that are all on this host; None, on all of them, where they cannot share any.

    Called by all ranks. `share` gives every rank's result of a function to all.
    """
    # Other processors may show a stamp before what was written before it.
    able = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    name, handle = f"dist_train {secrets.token_hex(8)}", None
    if able and rank == 0:
        handle = os.memfd_create(name)
        os.ftruncate(handle, _bytes_for(size))
    known: Sequence[tuple[Process, str, int | None]] = share(lambda: (Process.of(os.getpid()), name, handle))
    first, name, shared = known[0]
    if rank > 0 and able and shared is not None:
        handle = _memory_of(first, shared, name)
    exchange = None
    if all(share(lambda: handle is not None)):
        assert handle is not None
        exchange = Exchange(rank, [process for process, _, _ in known], handle)
    share(lambda: None)  # nobody closes it before all have opened it
    if handle is not None:
        os.close(handle)
    return exchange


def _memory_of(process: Process, handle: int, name: str) -> int | None:
    """The memory of that name that another process has open; None where it cannot be opened.

    In another container the number of a process may be that of a stranger, and `handle` a file of its own.
    """
    opened = process.open_file(handle, os.O_RDWR)
    if opened is not None and f"memfd:{name} " not in str(Path(f"/proc/self/fd/{opened}").readlink()):
        os.close(opened)
        return None
    return opened


def _bytes_for(size: int) -> int:
    return 2 * size * (_STAMP_BYTES + CAPACITY)
