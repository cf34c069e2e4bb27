"""Collectives on one, two and three ranks."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dist_train.distributed import broadcast, collectives
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import PeerFailed, Stopped, TrainingFault, UserError
from dist_train.system.machine import peak_memory_bytes
from tests.ranks import on_ranks

WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3])


def everything(c: Collectives) -> None:
    ranks = range(c.size)
    assert c.is_main == (c.rank == 0)
    ones = torch.full((2,), float(c.rank + 1), dtype=torch.float64)
    assert c.all_reduce(ones) is ones
    assert ones.tolist() == [c.size * (c.size + 1) / 2] * 2
    stacked = c.all_gather(torch.arange(6).view(2, 3).t() + 10 * c.rank)
    assert torch.equal(stacked, torch.stack([torch.arange(6).view(2, 3).t() + 10 * r for r in ranks]))
    assert c.all_gather(torch.tensor(c.rank)).tolist() == list(ranks)
    for lengths in ([2, 0, 3], [0, 0, 0], [0, 4, 0], [1, 1, 1]):
        own = torch.full((lengths[c.rank], 2), c.rank)
        expected = [[r, r] for r in ranks for _ in range(lengths[r])]
        joined = c.gather_rows(own)
        assert (joined is None) == (c.rank > 0)
        if joined is not None:
            assert joined.shape == (len(expected), 2)
            assert joined.tolist() == expected
    assert c.all_gather_object(lambda: {"rank": c.rank}) == [{"rank": r} for r in ranks]
    calls: list[int] = []
    assert c.on_rank_zero(lambda: calls.append(c.rank) or "made") == "made"  # type: ignore[func-returns-value]
    assert calls == ([0] if c.is_main else [])


@WORLDS
def test_everything(world_size: int) -> None:
    on_ranks(world_size, everything)


def failing(c: Collectives, failing_ranks: list[int], kind: type[Exception]) -> tuple[str, str]:
    def act() -> int:
        if c.rank in failing_ranks:
            raise kind(f"rank {c.rank} has found a mistake")
        return c.rank

    with pytest.raises(kind) as failure:
        c.all_gather_object(act)
    assert c.all_gather_object(lambda: c.rank) == list(range(c.size)), "the ranks are out of step after a failure"
    return type(failure.value).__name__, str(failure.value)


@pytest.mark.parametrize("kind", [UserError, TrainingFault, OSError, FileNotFoundError])
@pytest.mark.parametrize("failing_ranks", [[1], [2, 1], [0, 2]])
def test_a_failure_on_any_rank_is_that_of_the_lowest_on_all(failing_ranks: list[int], kind: type[Exception]) -> None:
    lowest = min(failing_ranks)
    assert on_ranks(3, failing, failing_ranks, kind) == [(kind.__name__, f"rank {lowest} has found a mistake")] * 3


class Strange(ValueError):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")  # such an exception cannot be pickled


def failing_by_a_fault(c: Collectives, name: str) -> tuple[str, str]:
    def act() -> int:
        if c.rank == 1:
            raise Strange(1, 2)
        return c.rank

    with pytest.raises((Strange, PeerFailed)) as failure:
        getattr(c, name)(act)
    assert c.all_gather_object(lambda: c.rank) == list(range(c.size)), "the ranks are out of step after a failure"
    return type(failure.value).__name__, str(failure.value)


@pytest.mark.parametrize("name", ["all_gather_object", "run_on_all"])
def test_a_fault_of_the_program_on_one_rank_leaves_nobody_waiting(name: str) -> None:
    first, second = on_ranks(2, failing_by_a_fault, name)
    assert first == ("PeerFailed", "rank 1 failed: Strange: 1 and 2")
    assert second == ("Strange", "1 and 2")


def failing_first(c: Collectives) -> str:
    def make() -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    with pytest.raises(PermissionError) as failure:
        c.on_rank_zero(make)
    return str(failure.value)


@WORLDS
def test_a_failure_of_the_first_is_raised_on_all(world_size: int) -> None:
    assert on_ranks(world_size, failing_first) == ["[Errno 13] Permission denied: '/somewhere'"] * world_size


def broadcast_of(c: Collectives, value: Any) -> Any:
    received = c.on_rank_zero(lambda: value)
    assert (received is value) == c.is_main
    return received


class Named(NamedTuple):
    """A class of its own, as a checkpoint that was found is."""

    name: str
    tensors: dict[str, torch.Tensor]


def varied(c: Collectives) -> None:
    half = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    frozen = np.arange(7, dtype=np.int32)
    frozen.flags.writeable = False
    tensors = {
        "half": half, "turned": half.t(), "one": torch.tensor(2.5, dtype=torch.float64), "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False]), "parameter": torch.nn.Parameter(torch.ones(3)),
        "every second": half[:, ::2], "expanded": torch.ones(1).expand(4),
        "wide": torch.zeros(3, 2, dtype=torch.complex64),
    }  # fmt: skip
    shared = tensors["half"]
    value = [Named("x" * 5000, tensors), {"again": shared, "numbers": frozen, "bytes": b"abc" * 1000}, None]
    got, more, nothing = broadcast_of(c, value)
    assert nothing is None
    assert got.name == "x" * 5000
    assert list(got.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert type(got.tensors[name]) is type(tensor)
        assert got.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.tensors[name], tensor), name
    assert more["again"] is got.tensors["half"]
    assert more["numbers"].tolist() == frozen.tolist()
    assert more["bytes"] == b"abc" * 1000
    got.tensors["half"] += 1  # what was received can be written to, and stays with whoever received it
    assert c.on_rank_zero(lambda: float(got.tensors["half"][0, 0])) == 1.0
    for size in (900, 980, 1000, 1010, 1024, 3000):  # around the size of what goes in one message
        assert broadcast_of(c, "y" * size) == "y" * size


@WORLDS
def test_any_object_is_broadcast_as_it_is(world_size: int) -> None:
    on_ranks(world_size, varied)


PAYLOAD_BYTES = 200 << 20


def peak_of(c: Collectives, chunk_bytes: int) -> float:
    """By how much a broadcast has raised the peak memory of this rank, in payloads."""
    broadcast._CHUNK_BYTES = chunk_bytes
    value = None
    if c.is_main:
        moments = {f"layer{i}": torch.full((PAYLOAD_BYTES // 32,), float(i)) for i in range(8)}
        value = {"optimizer.pth": moments, "state.json": {"step": 3}}
    before = peak_memory_bytes(torch.device("cpu"))
    received = c.on_rank_zero(lambda: value)
    after = peak_memory_bytes(torch.device("cpu"))
    assert received is not None
    assert received["state.json"] == {"step": 3}
    for i in range(8):
        tensor = received["optimizer.pth"][f"layer{i}"]
        assert tensor[0] == tensor[-1] == i
    return (after - before) / PAYLOAD_BYTES


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1 << 26])
def test_what_is_large_is_broadcast_once_and_copied_nowhere(chunk_bytes: int) -> None:
    first, *others = on_ranks(4, peak_of, chunk_bytes)
    assert first < 0.2
    assert all(0.9 < other < 1.3 for other in others)


def unpicklable(c: Collectives) -> str:
    with pytest.raises((PeerFailed, AttributeError, TypeError, pickle.PicklingError)) as failure:
        c.on_rank_zero(lambda: threading.Lock())
    assert c.on_rank_zero(lambda: 3) == 3, "the ranks are out of step after a failure"
    return type(failure.value).__name__


def test_what_cannot_be_pickled_leaves_nobody_waiting() -> None:
    first, *others = on_ranks(3, unpicklable)
    assert first != "PeerFailed"
    assert others == ["PeerFailed"] * 2


def fault_of_the_first(c: Collectives) -> str:
    def make() -> int:
        raise Strange(1, 2)

    with pytest.raises((Strange, PeerFailed)) as failure:
        c.on_rank_zero(make)
    assert c.on_rank_zero(lambda: c.rank) == 0, "the ranks are out of step after a failure"
    return f"{type(failure.value).__name__}: {failure.value}"


def test_a_fault_of_the_program_on_rank_zero_reaches_all() -> None:
    failed = "PeerFailed: rank 0 failed: Strange: 1 and 2"
    assert on_ranks(3, fault_of_the_first) == ["Strange: 1 and 2", failed, failed]


def stopped_first(c: Collectives) -> str:
    def make() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        c.on_rank_zero(make)
    return "stopped"


@WORLDS
def test_a_stop_on_rank_zero_stops_all(world_size: int) -> None:
    assert on_ranks(world_size, stopped_first) == ["stopped"] * world_size


def place_of(c: Collectives) -> str | None:
    c.on_rank_zero(lambda: None)
    return c.heartbeat.read().history[-1]


def test_the_heartbeat_says_who_waits_for_rank_zero() -> None:
    for place in on_ranks(2, place_of):
        assert place.startswith(f"on_rank_zero in {__name__}.place_of, line ")


def gathered_in_pieces(c: Collectives) -> list[int] | None:
    collectives._MESSAGE_BYTES = 24  # three rows
    rows = c.gather_rows(torch.arange(10 * c.rank, 10 * c.rank + 4 + c.rank))
    return None if rows is None else rows.tolist()


def test_rows_are_gathered_in_pieces() -> None:
    expected = [*range(4), *range(10, 15), *range(20, 26)]
    assert on_ranks(3, gathered_in_pieces) == [expected, None, None]


def gathered_by_a_rank_without_rows(c: Collectives) -> list[list[int]] | None:
    collectives._MESSAGE_BYTES = 16  # one row
    rows = c.gather_rows(torch.arange(4).view(2, 2)[: 2 * c.rank])
    return None if rows is None else rows.tolist()


def test_rank_0_without_rows_expects_the_pieces_that_others_send() -> None:
    assert on_ranks(2, gathered_by_a_rank_without_rows) == [[[0, 1], [2, 3]], None]


def same_bits(c: Collectives) -> bytes:
    values = torch.from_numpy(np.random.default_rng(c.rank).normal(size=1000)).float()
    return c.all_reduce(values).numpy().tobytes()


def test_a_sum_is_the_same_bits_on_every_rank() -> None:
    assert len(set(on_ranks(3, same_bits))) == 1


def default_group(c: Collectives) -> Any:
    found = Collectives.of_default_group(torch.device("cpu"))
    return (found.rank, found.size) == (c.rank, c.size)


@WORLDS
def test_the_default_group(world_size: int) -> None:
    assert all(on_ranks(world_size, default_group))


def test_one_process_shares_nothing() -> None:
    alone, x = Collectives(World()), torch.arange(3)
    assert alone.gather_rows(x) is x
    assert alone.all_gather(x).shape == (1, 3)
    with pytest.raises(KeyError):  # a fault of the program is not dressed up as the user's mistake
        alone.all_gather_object(lambda: {}["missing"])


def _rounds(collectives: Collectives, fails: bool) -> tuple[list[int], list[int], str]:
    """Ranks with one, two and three items; the second item of rank 1 fails where it is told to."""
    done: list[int] = []
    shown: list[int] = []

    def work() -> Iterator[int]:
        for item in range(collectives.rank + 1):
            if fails and collectives.rank == 1 and item == 1:
                raise UserError("the second item")
            done.append(item)
            yield 10 + item

    try:
        collectives.lockstep(work(), shown.append)
    except UserError as error:
        return done, shown, str(error)
    return done, shown, "through"


def test_in_rounds_all_ranks_go_through_their_work_and_hear_of_each_round() -> None:
    shown = [30, 22, 12]
    assert on_ranks(3, _rounds, False) == [
        ([0], shown, "through"),
        ([0, 1], shown, "through"),
        ([0, 1, 2], shown, "through"),
    ]


def test_in_rounds_a_failure_ends_the_round_on_every_rank() -> None:
    found = on_ranks(3, _rounds, True)
    assert [message for _, _, message in found] == ["the second item"] * 3
    assert [done for done, _, _ in found] == [[0], [0], [0, 1]]


def _asked(collectives: Collectives) -> int:
    count = 0

    def work() -> Iterator[int]:
        nonlocal count
        for _ in range(50):
            count += 1
            yield 1

    world = World(rank=collectives.rank, size=collectives.size)
    asked = Collectives(world, lambda: collectives.rank == 1 and count == 3)
    try:
        asked.lockstep(work())
    except Stopped:
        return count
    return -1


def test_in_rounds_one_rank_that_is_asked_stops_all_after_the_same_round() -> None:
    assert on_ranks(2, _asked) == [3, 3]


# The device of ranks under NCCL: whatever is on it comes to nobody's hands before all ranks have sent theirs.
ELSEWHERE = torch.device("meta")


def waits_seen(c: Collectives, name: str) -> str | None:
    """What the watchdog sees of rank 0 while rank 1 is late for a decision."""
    world = World(rank=c.rank, size=c.size, device=ELSEWHERE, backend="nccl")
    late = Collectives(world, lambda: False)
    decide = {
        "raise_if_stop_agreed": late.raise_if_stop_agreed,
        "lockstep": lambda: late.lockstep(iter([1])),
        "gather_rows": lambda: late.gather_rows(torch.zeros(3, 1)),
        "all_gather_object": lambda: late.all_gather_object(lambda: c.rank),
    }[name]
    seen: list[str | None] = []
    decided = threading.Event()

    def look() -> None:
        while not decided.wait(0.01):
            seen.append(late.heartbeat.read().collective)

    watching = threading.Thread(target=look)
    watching.start()
    if c.rank == 1:
        time.sleep(0.5)
    decide()
    decided.set()
    watching.join()
    return next(filter(None, seen), None)


@pytest.mark.parametrize("name", ["raise_if_stop_agreed", "lockstep", "gather_rows", "all_gather_object"])
def test_under_nccl_it_is_seen_who_waits_for_a_decision(name: str) -> None:
    waiting, _ = on_ranks(2, waits_seen, name)
    assert waiting is not None


class OnAGpu:
    """Rows of a GPU, as far as they are sent to the host; the host waits in `cpu` for all kernels before."""

    device = torch.device("cuda")

    def __init__(self, c: Collectives) -> None:
        self._collectives = c

    def cpu(self) -> torch.Tensor:
        self.seen = self._collectives.heartbeat.read().collective
        return torch.ones(3, 1)


def test_it_is_seen_that_a_rank_waits_for_its_gpu_in_an_evaluation() -> None:
    alone = Collectives(World())
    rows: Any = OnAGpu(alone)
    assert alone.gather_rows(rows) is not None
    assert rows.seen.startswith("fetch in ")
    assert alone.heartbeat.read().collective is None
