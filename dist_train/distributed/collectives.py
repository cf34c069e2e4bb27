"""Communication between ranks. Every call has a meaning in a world of one, so that callers never ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.distributed.broadcast import Packed, receive
from dist_train.distributed.world import World
from dist_train.errors import PeerFailed, Stopped, TrainingFault, UserError
from dist_train.watchdog.heartbeat import Heartbeat

T = TypeVar("T")

_MESSAGE_BYTES = 1 << 24


class Transport(Protocol):
    """A faster way between ranks than the process group. It gives the same bits on every rank."""

    def takes(self, *tensors: Tensor) -> bool:
        """Whether tensors of these shapes and types go together by this way; the same on all ranks, which all ask."""

    def all_reduce(self, *tensors: Tensor) -> None:
        """Sum each over the ranks, in place."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(...) -> (world, ...), in rank order."""


class Tape(Protocol):
    """Takes down what an `all_gather` gives, or says it."""

    def all_gather(self, own: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """What the ranks have gathered, (...) -> (world, ...); `gather` does it."""


class Collectives:
    """Collectives over the ranks of `world`. All ranks must make the same calls in the same order.

    What the host decides by (votes, lengths, objects) is in tensors of the host, which go by gloo: NCCL's calls return
    at once, so nobody could see which rank waits for whom.

    `wants_stop` says whether this process was asked to stop; None, on all ranks alike: the job cannot be stopped.
    `heartbeat` records every collective. `transport`, None on all ranks or on none, is tried first by `all_reduce` and
    `all_gather`. Every `all_gather` goes through the `tape`, where there is one.
    """

    def __init__(self, world: World, wants_stop: Callable[[], bool] | None = None) -> None:
        self.rank = world.rank
        self.size = world.size
        self.local_size = world.local_size
        self.device = world.device
        # Whether a collective is a kernel on the GPU among others, so that nobody waits for it on the host.
        self.runs_on_device = world.device.type == "cuda" and (world.size == 1 or world.backend == "nccl")
        self.heartbeat = Heartbeat(internal=("collectives", "broadcast", "tape"))
        self._wants_stop = wants_stop
        self.transport: Transport | None = None
        self.tape: Tape | None = None

    @classmethod
    def of_default_group(cls, device: torch.device) -> Collectives:
        """Over the ranks of torch's default process group; a world of one when none is open."""
        if not dist.is_initialized():
            return cls(World(device=device))
        return cls(World(rank=dist.get_rank(), size=dist.get_world_size(), device=device))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, *more: Tensor) -> Tensor:
        """Sum over ranks of each tensor, in place; every rank gets the same bits. The first one comes back."""
        if self.size > 1:
            transport = self.transport_for(tensor, *more)
            with self.heartbeat.waiting("all_reduce"):
                if transport:
                    transport.all_reduce(tensor, *more)
                else:
                    for own in (tensor, *more):
                        dist.all_reduce(own)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Same-shaped tensors of all ranks, stacked in rank order: (...) -> (world, ...)."""
        return self._gathered(tensor) if self.tape is None else self.tape.all_gather(tensor, self._gathered)

    def _gathered(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor.unsqueeze(0)
        transport = self.transport_for(tensor)
        with self.heartbeat.waiting("all_gather"):
            if transport:
                return transport.all_gather(tensor)
            gathered = tensor.new_empty((self.size, *tensor.shape))
            dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def transport_for(self, *tensors: Tensor) -> Transport | None:
        """The transport that takes such tensors together; None: the process group does. Called by all ranks."""
        return self.transport if self.transport is not None and self.transport.takes(*tensors) else None

    def ordered_sum(self, partials: Tensor) -> Tensor:
        """Sum of the partials of all slices of all ranks in one fixed order: (slices, ...) -> (...).

        The same bits for every world size, as long as the slices of all ranks together are the same. A sum of one
        partial is that partial itself, not a copy.
        """
        return sum_of_slices(self.all_gather(partials))

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """Rows of all ranks joined in rank order, on the CPU of rank 0; None on the other ranks.

        (rows of this rank, ...) -> (rows of all ranks, ...); numbers of rows may differ or be 0.
        """
        own = self._to_host(rows)
        if self.size == 1:
            return own
        lengths = self.all_gather(torch.tensor(len(own))).tolist()
        row_bytes = own.element_size() * own.shape[1:].numel()  # not of a row: this rank may have none
        per_message = max(1, _MESSAGE_BYTES // max(1, row_bytes))
        if not self.is_main:
            for start in range(0, len(own), per_message):
                with self.heartbeat.waiting("gather_rows"):
                    dist.send(own[start : start + per_message].contiguous(), 0)
            return None
        ends = list(accumulate(lengths))
        joined = own.new_empty((ends[-1], *own.shape[1:]))
        joined[: ends[0]] = own
        for rank, (first, last) in enumerate(pairwise(ends), start=1):
            for start in range(first, last, per_message):
                with self.heartbeat.waiting("gather_rows"):
                    dist.recv(joined[start : min(last, start + per_message)], rank)
        return joined

    def _to_host(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, once all work so far is done: that of other ranks as well where a kernel waits."""
        if tensor.device.type == "cpu":
            return tensor
        with self.heartbeat.waiting("fetch"):
            return tensor.cpu()

    def on_rank_zero(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, broadcast to all; rank 0 and a world of one get the object itself.

        A failure of `make` is raised on every rank, as in `all_gather_object`. What only rank 0 needs, `make` keeps to
        itself and returns None. Memory of a rank: one copy of what is broadcast.
        """
        if not self.is_main:
            value, failure = receive(self._broadcast)
            if failure is not None:
                raise failure
            return cast(T, value)
        outcome = _attempt(make, self.rank)
        if self.size > 1:
            try:
                packed = Packed((outcome.value, outcome.failure))
            except Exception as error:
                outcome = _Outcome(None, PeerFailed(f"rank 0 failed: {type(error).__name__}: {error}"), error)
                packed = Packed((None, outcome.failure))
            packed.send(self._broadcast)
        outcome.raise_own()
        return cast(T, outcome.value)

    def kept_on_rank_zero(self, make: Callable[[], T]) -> T | None:
        """What `make` returns on rank 0, which keeps it; None on the others. It fails as `on_rank_zero`."""
        kept: list[T] = []
        self.on_rank_zero(lambda: kept.append(make()))
        return kept[0] if kept else None

    def tensors_of_rank_zero(self, tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Tensors that rank 0 has, each broadcast when it is asked for, which all ranks do in the same order.

        `tensors` counts on rank 0. Memory of a rank: what it keeps of them.
        """
        return tensors if tensors is not None and self.size == 1 else _TensorsOfRankZero(self, tensors)

    def _broadcast(self, data: Tensor) -> None:
        with self.heartbeat.waiting("on_rank_zero"):
            dist.broadcast(data, 0)

    def all_gather_object(self, act: Callable[[], T]) -> Sequence[T]:
        """Run `act` on every rank; all ranks get all results, in rank order. For small results.

        A UserError, TrainingFault, Stopped or OSError on any rank becomes the same error on all ranks, that of the
        lowest rank that failed, so that every rank leaves by the same way. Any other exception is a fault of the
        program: the rank that has it raises it, with its traceback, the others a PeerFailed that says whose it was.
        """
        own = _attempt(act, self.rank)
        outcomes: list[tuple[Any, Any]] = [(own.value, own.failure)]
        if self.size > 1:
            outcomes = [(None, None)] * self.size
            with self.heartbeat.waiting("all_gather_object"):
                dist.all_gather_object(outcomes, (own.value, own.failure))
        if own.fault is not None:
            raise own.fault
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [value for value, _ in outcomes]

    def run_on_all(self, act: Callable[[], T]) -> T:
        """Run `act` on every rank; each keeps its own result, which is not sent. It fails as `all_gather_object`."""
        mine: list[T] = []
        self.all_gather_object(lambda: mine.append(act()))
        return mine[0]

    def async_to_host(self, *wanted: Tensor | float) -> Callable[[], list[float]]:
        """Ask for numbers, some of them in tensors, as they are once all work so far is done; the call gives them.

        Those in tensors of the host are read by the call.

        On a GPU nothing is waited for until then, so that more work can be sent off meanwhile.
        """
        if not any(isinstance(part, Tensor) and part.is_cuda for part in wanted):
            return lambda: _numbers(wanted)
        joined = torch.cat([torch.as_tensor(part, device=self.device).view(-1).double() for part in wanted])
        arrived = torch.cuda.Event()
        host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True).copy_(joined, non_blocking=True)
        arrived.record()

        def wait() -> list[float]:
            # Where a rank hangs in a kernel that waits for the others, it is here that it is seen to hang.
            with self.heartbeat.waiting("fetch"):
                arrived.synchronize()
            return cast(list[float], host.tolist())

        return wait

    def lockstep(self, work: Iterator[int], show: Callable[[int], None] = lambda _done: None) -> None:
        """Go through `work` on every rank, one item a round, until all ranks are through with theirs.

        No rank waits for another for longer than an item takes, and between two rounds all can stop together. An item
        is a count of what was done; `show` is told the sum over ranks of each round. It fails as `all_gather_object`
        does.
        """
        while True:
            count: int | None = None
            failure: Exception | None = None
            try:
                count = next(work, None)
            except Exception as error:
                failure = error
            wants_stop = self._wants_stop is not None and self._wants_stop()
            mine = [failure is not None, count is not None, wants_stop, count or 0]
            votes = torch.tensor([int(vote) for vote in mine])
            failed, going, asked, done = self.all_reduce(votes).tolist()
            if failed:
                self.all_gather_object(lambda failure=failure: _raise(failure))  # type: ignore[misc]
            if not going:
                return
            show(done)
            if asked:
                raise Stopped

    def raise_if_stop_agreed(self) -> None:
        """A place where all ranks can stop together: raises Stopped on every rank when one of them was asked to."""
        if self._wants_stop is not None:
            votes = torch.tensor([float(self._wants_stop())])
            if self.all_reduce(votes).item():
                raise Stopped


def sum_of_slices(gathered: Tensor) -> Tensor:
    """What the ranks have gathered, (world, slices of a rank, ...) -> (...), added up as `ordered_sum` does."""
    slices = gathered.flatten(0, 1)
    return slices.squeeze(0) if len(slices) == 1 else slices.sum(0)


class _TensorsOfRankZero(Mapping[str, Tensor]):
    """Names on every rank; a tensor when it is asked for."""

    def __init__(self, collectives: Collectives, tensors: Mapping[str, Tensor] | None) -> None:
        self._collectives = collectives
        self._tensors = tensors
        self._names = dict.fromkeys(collectives.on_rank_zero(lambda: list(tensors or {})))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._collectives.on_rank_zero(lambda: cast(Mapping[str, Tensor], self._tensors)[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _numbers(parts: Sequence[Tensor | float]) -> list[float]:
    found: list[float] = []
    for part in parts:
        if not isinstance(part, Tensor):
            found.append(part)
        elif part.ndim:
            found += part.view(-1).tolist()
        else:
            found.append(part.item())
    return found


class _Outcome(NamedTuple):
    """How a function has ended: its value, what the other ranks raise, what this rank raises instead of that."""

    value: Any
    failure: Exception | None = None
    fault: Exception | None = None

    def raise_own(self) -> None:
        if self.fault is not None:
            raise self.fault
        if self.failure is not None:
            raise self.failure


def _attempt(act: Callable[[], Any], rank: int) -> _Outcome:
    try:
        return _Outcome(act())
    except (UserError, TrainingFault, Stopped, OSError) as error:
        return _Outcome(None, error)
    except Exception as error:
        return _Outcome(None, PeerFailed(f"rank {rank} failed: {type(error).__name__}: {error}"), error)


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure
