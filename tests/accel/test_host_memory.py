"""Memory that ranks of a host share, against gloo."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_train.accel.host_memory import CAPACITY, Exchange, _bytes_for, open_exchange, use_host_memory
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.watchdog.processes import Process
from tests.patience import PATIENCE_SECONDS
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"),
    reason="ranks share memory on Linux on x86-64 only",
)


def as_gloo_does(c: Collectives) -> int:
    """The number of calls that have given the same as gloo, bit for bit."""
    by_gloo = Collectives(World(rank=c.rank, size=c.size))
    generator = torch.Generator().manual_seed(c.rank)
    pause = np.random.default_rng(c.rank)
    count = 0
    for shape in [(), (1,), (0,), (3,), (2, 0, 4), (3, 2, 256), (47_000,), (3,)] * 4:
        for dtype in (torch.float32, torch.float64, torch.int64, torch.int32):
            own = (torch.randn(shape, generator=generator) * 100).to(dtype)
            own = own.t() if own.ndim == 2 else own  # also what is not contiguous
            if pause.random() < 0.1:
                time.sleep(pause.random() * 0.005)
            stacked, kept = c.all_gather(own), own.clone()
            assert torch.equal(stacked, by_gloo.all_gather(own))
            total = c.all_reduce(own)
            assert total is own
            assert torch.equal(total, stacked.sum(0, dtype=dtype))
            assert c.size > 2 or torch.equal(total, by_gloo.all_reduce(kept))
            several = [
                kept.clone().contiguous(),
                torch.tensor([c.rank] * 3, dtype=torch.int32),
                torch.tensor(0.1 + c.rank),
            ]
            expected = [c.all_reduce(tensor.clone()) for tensor in several]
            assert c.all_reduce(*several) is several[0]
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(several, expected, strict=True))
            c.all_gather_object(lambda: None)
            count += 1
    assert c.transport_for(torch.zeros(CAPACITY // 4)) is not None
    assert c.transport_for(torch.zeros(CAPACITY // 4 + 1)) is None
    assert c.transport_for(torch.zeros(CAPACITY // 4), torch.zeros(1)) is None
    assert by_gloo.transport is None
    for length in range(600):  # views of so many shapes are not kept
        assert c.all_gather(torch.full((length,), float(c.rank), requires_grad=True)).sum() == length * sum(
            range(c.size)
        )
    large = torch.full((CAPACITY,), float(c.rank))
    assert c.all_reduce(large)[-1] == sum(range(c.size))
    return count


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_comes_back_is_what_gloo_gives(world_size: int) -> None:
    assert on_ranks(world_size, as_gloo_does) == [128] * world_size


def never_twice(c: Collectives) -> None:
    """What was handed out is the caller's own, whatever comes after."""
    first = c.all_gather(torch.tensor([c.rank]))
    for _ in range(5):
        c.all_gather(torch.tensor([-1]))
    assert first.flatten().tolist() == list(range(c.size))


def test_what_was_gathered_stays() -> None:
    on_ranks(2, never_twice)


def shared(processes: Sequence[Process]) -> list[Exchange]:
    """Both ends of an exchange, in this process."""
    handle = os.memfd_create("test")
    os.ftruncate(handle, _bytes_for(2))
    ends = [Exchange(rank, processes, handle) for rank in range(2)]
    os.close(handle)
    return ends


class Sleeper:
    """Another process, and this one."""

    def __enter__(self) -> Sleeper:
        self.process = subprocess.Popen(["sleep", "1000"])
        self.both = [Process.of(os.getpid()), Process.of(self.process.pid)]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_a_rank_that_is_gone_is_noticed() -> None:
    with Sleeper() as other:
        mine, _ = shared(other.both)
    with pytest.raises(dist.DistNetworkError, match="rank 1 is gone"):
        mine.all_gather(torch.zeros(3))


def test_what_a_rank_has_left_before_it_went_counts() -> None:
    with Sleeper() as other:
        mine, theirs = shared(other.both)
        leave(theirs, torch.ones(3))
    assert mine.all_gather(torch.zeros(3)).tolist() == [[0, 0, 0], [1, 1, 1]]


def leave(exchange: Exchange, tensor: torch.Tensor) -> threading.Thread:
    """Have another thread come to a call; it waits there until the rank it waits for comes, or is gone."""

    def come() -> None:
        with suppress(dist.DistNetworkError):
            exchange.all_gather(tensor)

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    time.sleep(0.05)
    return thread


@pytest.mark.parametrize("call", [lambda e: e.all_gather(torch.zeros(4)), lambda e: e.all_reduce(torch.zeros(3))])
def test_ranks_that_are_out_of_step_wait_for_the_watch(call: Callable[[Exchange], Any]) -> None:
    with Sleeper() as other:
        # For each end the other one is the process that sleeps.
        mine, theirs = shared([other.both[1], other.both[1]])
        waits = leave(theirs, torch.ones(3))
        answers: list[Any] = []

        def come() -> None:
            with pytest.raises(dist.DistNetworkError):
                answers.append(call(mine))

        thread = threading.Thread(target=come, daemon=True)
        thread.start()
        time.sleep(0.4)
        assert thread.is_alive()
        assert waits.is_alive()
    thread.join(PATIENCE_SECONDS)
    waits.join(PATIENCE_SECONDS)
    assert not answers
    assert not thread.is_alive()


def test_it_steps_aside_where_ranks_do_not_share_a_host_or_are_alone() -> None:
    for world in (World(), World(size=4, local_size=2), World(size=2, local_size=2, device=torch.device("meta"))):
        assert use_host_memory(Collectives(world)).transport is None
    assert use_host_memory(Collectives(World(size=2, local_size=2))).transport is not None


def without_memory(c: Collectives) -> list[float]:
    platform.machine = lambda: "aarch64"
    assert c.transport_for(torch.ones(3)) is None
    return c.all_reduce(torch.full((3,), 1.0 + c.rank)).tolist()  # type: ignore[no-any-return]


def test_where_memory_cannot_be_shared_the_process_group_is_used() -> None:
    assert on_ranks(2, without_memory) == [[3.0] * 3] * 2


def test_another_processor_has_no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(act: Callable[[], Any]) -> list[Any]:
        return [act(), act()]

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert open_exchange(0, 2, share) is None
    monkeypatch.undo()
    assert open_exchange(0, 2, share) is not None


def test_memory_of_a_stranger_is_left_alone(tmp_path: Path) -> None:
    """Containers count their processes from 1: what rank 0 has open may be another file in another one."""
    with (tmp_path / "precious").open("w+") as file:
        file.write("precious")
        file.flush()
        mine = Process.of(os.getpid())

        def share(act: Callable[[], Any]) -> list[Any]:
            answer = act()
            return [(mine, "dist_train 1234", file.fileno()), answer] if isinstance(answer, tuple) else [answer]

        assert open_exchange(1, 2, share) is None
    assert (tmp_path / "precious").read_text() == "precious"
