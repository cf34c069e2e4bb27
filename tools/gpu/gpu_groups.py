"""Parts of the probe that need a process group: NCCL in a group of one, and DistributedDataParallel in a graph."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World, torch_backend
from tools.gpu.gpu_place import COMPARED, SETTLED, Place, Result, Trainer, check, eager_step, numbers, replays

# After which a process group that does not end is left behind.
TEARDOWN_SECONDS = 20.0


def nccl(place: Place) -> Result:
    """Collectives of a group of one, on both devices; one of them in a graph; torch's SyncBatchNorm itself."""

    def act() -> Result:
        notes = []
        for where in {place.device, torch.device("cpu")}:
            total = torch.arange(6, dtype=torch.float64, device=where)
            dist.all_reduce(total)
            gathered = torch.empty((1, 6), dtype=torch.float64, device=where)
            dist.all_gather(list(gathered.unbind()), total)
            assert gathered[0].tolist() == [0, 1, 2, 3, 4, 5], (where, gathered)
        objects: list[Any] = [None]
        dist.all_gather_object(objects, {"a": 1})
        assert objects == [{"a": 1}]
        notes.append("all_reduce, all_gather, objects")
        if place.on_gpu:
            _synchronised_layer(place)
            notes.append("SyncBatchNorm's own kernels equal BatchNorm1d")
            _all_reduce_in_a_graph(place)
            notes.append("all_reduce in a graph")
        return check(True, "; ".join(notes))

    return _in_a_group(place, act)


def _synchronised_layer(place: Place) -> None:
    """The layer calls torch's kernel for one rank; the function under it is what several ranks run."""
    from torch.nn.modules._functions import SyncBatchNorm

    synced_layer: Any = SyncBatchNorm
    kind: dict[str, Any] = {"device": place.device, "dtype": torch.float64}
    x = torch.randn((64, 5), **kind, requires_grad=True)
    plain, twin = torch.nn.BatchNorm1d(5, **kind), torch.nn.BatchNorm1d(5, **kind)
    synced = synced_layer.apply(
        x, twin.weight, twin.bias, twin.running_mean, twin.running_var, twin.eps, 0.1, dist.group.WORLD, 1
    )
    expected = plain(x)
    factors = torch.randn_like(expected)
    first = torch.autograd.grad((synced * factors).sum(), x)[0]
    second = torch.autograd.grad((expected * factors).sum(), x)[0]
    torch.testing.assert_close(synced, expected)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(twin.running_var, plain.running_var)


def _all_reduce_in_a_graph(place: Place) -> None:
    number = torch.zeros((), device=place.device)

    def step() -> None:
        number.add_(1)
        dist.all_reduce(number)

    replay = place.captured(step)
    before = number.item()
    for _ in range(5):
        replay()
    assert number.item() == before + 5, number


class OneOfTwo(Collectives):
    """Collectives of a rank that is alone in its process group and takes itself for the first of two alike."""

    def __init__(self, place: Place) -> None:
        super().__init__(World(rank=0, size=2, local_size=2, device=place.device, backend="nccl"))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The same from both."""
        own = tensor.new_empty((1, *tensor.shape))
        dist.all_gather(list(own.unbind()), tensor.contiguous())
        return torch.cat([own, own])


def ddp_in_a_graph(place: Place) -> Result:
    """The step of several NCCL ranks, recorded: a session in a group of one that it takes for one of two."""

    def act() -> Result:
        two = OneOfTwo(place)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            session = place.session(256, *COMPARED, collectives=two)
            other = place.session(256, *COMPARED, collectives=two)
            steps, expected = Trainer(session), Trainer(other, eager_step(other))
            differs = [number for number in range(2 * SETTLED) if numbers(steps()) != numbers(expected())]
            recorded = bool(replays(session))
            eager_us = place.wall_us(expected, 10)
            recorded_us = place.wall_us(steps, 10)
            place.wait()
        session.close()
        other.close()
        warned = sorted({str(w.message).splitlines()[0][:160] for w in caught})
        said = f"{'' if recorded else 'NOT '}recorded; steps that differ from the eager ones: {differs}"
        said += f"; {recorded_us:,.0f} us a step, eager {eager_us:,.0f}" + "".join(f"; warned: {w}" for w in warned)
        return check(recorded and not differs and not warned, said)

    return _in_a_group(place, act)


def _in_a_group(place: Place, act: Callable[[], Result]) -> Result:
    """What `act` gives in a process group of this rank alone; not held where the group does not end."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            torch_backend(World(device=place.device, backend="nccl")) if place.on_gpu else "gloo",
            store=dist.FileStore(f"{folder}/store", 1),
            rank=0,
            world_size=1,
            device_id=place.device if place.on_gpu else None,
        )
        result = None
        try:
            result = act()
        finally:
            ended = threading.Event()

            def leave() -> None:
                dist.destroy_process_group()
                ended.set()

            threading.Thread(target=leave, daemon=True).start()
            if not ended.wait(TEARDOWN_SECONDS):
                said = "destroy_process_group does not return"
                print(f"  BROKE {said}", flush=True)
                result = result and check(False, f"{result['said']}; {said}")
    assert result is not None
    return result
