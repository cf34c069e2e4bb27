"""NCCL in a group of one rank, which is all that one GPU has. Skipped, with a reason, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train.determinism.batch_norm import GatheredBatchNorm1d
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World, torch_backend
from dist_train.execution.recorder import CudaRecorder
from tests.gpu import graphs
from tests.gpu.graphs import assert_recorded_is_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda sees no GPU on this machine"),
]


class OneOfTwo(Collectives):
    """Collectives of a rank that is alone in its process group and takes itself for the first of two alike."""

    def __init__(self) -> None:
        backend = "nccl" if graphs.DEVICE.type == "cuda" else "gloo"
        super().__init__(World(rank=0, size=2, local_size=2, device=graphs.DEVICE, backend=backend))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The same from both."""
        own = tensor.new_empty((1, *tensor.shape))
        dist.all_gather(list(own.unbind()), tensor.contiguous())
        return torch.cat([own, own])


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """As a run of several ranks opens it."""
    on_gpu = graphs.DEVICE.type == "cuda"
    dist.init_process_group(
        torch_backend(World(device=graphs.DEVICE, backend="nccl" if on_gpu else "gloo")),
        store=dist.FileStore(str(tmp_path / "store"), 1),
        rank=0,
        world_size=1,
        device_id=graphs.DEVICE if on_gpu else None,
    )
    yield
    dist.destroy_process_group()


def test_collectives_take_tensors_of_the_gpu_and_of_the_host() -> None:
    for where in (graphs.DEVICE, torch.device("cpu")):
        total = torch.arange(6, dtype=torch.float64, device=where)
        dist.all_reduce(total)
        gathered = torch.empty((1, 6), dtype=torch.float64, device=where)
        dist.all_gather(list(gathered.unbind()), total)
        assert gathered[0].tolist() == [0, 1, 2, 3, 4, 5]
    objects = [None]
    dist.all_gather_object(objects, {"a": 1})
    assert objects == [{"a": 1}]


def test_an_all_reduce_is_recorded() -> None:
    number, recorder = torch.zeros((), device=graphs.DEVICE), CudaRecorder()

    def step() -> None:
        number.add_(1)
        dist.all_reduce(number)

    recorder.use_stream()
    for _ in range(3):
        step()
    recording = recorder.record(step)
    before = number.item()
    for _ in range(5):
        recording.replay()
    assert number.item() == before + 5
    recording.reset()


@pytest.mark.parametrize("rows", [33, 1])
def test_batch_norm_of_two_ranks_is_that_of_the_joined_batch(rows: int) -> None:
    """This rank's rows stand for the other one's as well."""
    plain = nn.BatchNorm1d(5, dtype=torch.float64, device=graphs.DEVICE)
    twin = GatheredBatchNorm1d.from_plain(nn.BatchNorm1d(5, dtype=torch.float64, device=graphs.DEVICE), OneOfTwo())
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64).to(graphs.DEVICE)
    ours, theirs = x.clone().requires_grad_(), torch.cat([x, x]).requires_grad_()
    output, expected = twin(ours), plain(theirs)
    torch.testing.assert_close(output, expected[:rows])
    torch.testing.assert_close(twin.running_var, plain.running_var)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad[:rows], rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("more", [(), ("train.precision=bf16", "train.ema_decay=0.9")], ids=str)
def test_the_step_of_several_ranks_is_recorded(more: tuple[str, ...]) -> None:
    """DistributedDataParallel, its all-reduce and BatchNorm's gathers, all in one graph."""
    _, shapes = assert_recorded_is_eager(*more, collectives=OneOfTwo(), steps=40)
    assert shapes == {256}


@pytest.mark.filterwarnings("error")
def test_the_exact_step_of_several_ranks_is_recorded() -> None:
    _, shapes = assert_recorded_is_eager("train.virtual_ranks=4", collectives=OneOfTwo(), steps=40)
    assert shapes == {256}
