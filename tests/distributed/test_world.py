"""Environment -> world, for each way of starting and each way of getting it half right."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from dist_train.distributed import world
from dist_train.distributed.world import World, torch_backend, world_from_environment
from dist_train.errors import UserError
from dist_train.system.torchrun import TORCHRUN_VARIABLES
from tests.patience import PATIENCE_SECONDS
from tests.ranks import in_processes

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9],cpu1",
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "99",
}


def read(environ: dict[str, str], **options: str) -> World:
    return world_from_environment(environ, **{"device": "cpu"} | options)


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_a_plain_process_is_a_world_of_one() -> None:
    assert read({}) == read({"PATH": "/bin", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == World()


def test_torchrun() -> None:
    found = read(TORCHRUN)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    assert (found.rendezvous, found.backend, found.device.type) == ("env://", "gloo", "cpu")


def test_torchrun_under_srun_wins() -> None:
    """SLURM_* describe the agent there, not the rank."""
    assert read(SRUN | TORCHRUN) == read(TORCHRUN)


def test_srun() -> None:
    found = read(SRUN)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (3, 6, 1, 2)
    assert found.rendezvous == "tcp://gpu03:23456"
    assert read(SRUN | {"MASTER_ADDR": "left over"}) == found


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("cpu1,gpu[1-2]", "cpu1"),
        ("localhost", "localhost"),
        ("gpu-a-01,gpu-a-02", "gpu-a-01"),
        ("rack[1-2]node[07-09,11]", "rack1node07"),
        ("gpu[1-3]-ib,cpu", "gpu1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert read(SRUN | {"SLURM_STEP_NODELIST": nodelist}).rendezvous == f"tcp://{host}:23456"


@pytest.mark.parametrize("nodelist", ["", "[", "gpu[1-2", " "])
def test_a_node_list_without_a_host(nodelist: str) -> None:
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST=.* names no host"):
        read(SRUN | {"SLURM_STEP_NODELIST": nodelist})


@pytest.mark.parametrize("name", TORCHRUN_VARIABLES)
def test_half_of_torchruns_environment_names_the_missing_half(name: str) -> None:
    with pytest.raises(UserError, match=rf"half set: .* given, {name} missing; start with torchrun, or unset"):
        read(without(TORCHRUN, name))
    others = [other for other in TORCHRUN_VARIABLES if other != name]
    with pytest.raises(UserError, match=f"half set: {name} given, {', '.join(others)} missing"):
        read({name: TORCHRUN[name]})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"])
def test_half_of_sruns_environment_names_the_missing_half(name: str) -> None:
    with pytest.raises(UserError, match=f"started by srun, but {name} is missing"):
        read(without(SRUN, name))


@pytest.mark.parametrize(
    ("environ", "name"),
    [(TORCHRUN, "RANK"), (TORCHRUN, "WORLD_SIZE"), (TORCHRUN, "LOCAL_WORLD_SIZE"), (SRUN, "SLURM_PROCID")],
)
@pytest.mark.parametrize("value", ["two", "1.5", ""])
def test_what_is_not_a_whole_number(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name}='{value}' in the environment is not a whole number"):
        read(environ | {name: value})


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("-1", "8"), ("0", "0"), ("0", "-2")])
def test_a_rank_outside_of_its_world(rank: str, size: str) -> None:
    with pytest.raises(UserError, match=f"rank {rank} does not exist in a world of {size}"):
        read(TORCHRUN | {"RANK": rank, "WORLD_SIZE": size})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that each rank of TORCHRUN sees `count` GPUs; of one GPU, one of its own where `own`, as under
    `srun --gpus-per-task=1`."""

    def pretend(count: int, *, own: bool = False) -> None:
        def uuid_of(rank: int) -> str:
            local = rank % 4
            return f"node{rank // 4}-gpu{local if own else local % count}"

        def meet(place: World, _timeout: float) -> HashStore:
            store = HashStore()
            for rank in range(place.size):
                if rank != place.rank:
                    PrefixStore("device", store).set(str(rank), uuid_of(rank))
            return store

        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(world, "_device_uuid", lambda _device: uuid_of(int(TORCHRUN["RANK"])))
        monkeypatch.setattr(world, "_meet", meet)

    return pretend


@pytest.mark.parametrize(
    ("count", "own", "device", "backend", "expected"),
    [
        (4, False, "auto", "auto", ("cuda:1", "nccl")),
        (4, False, "cuda", "nccl", ("cuda:1", "nccl")),
        (4, False, "auto", "gloo", ("cuda:1", "gloo")),
        (4, False, "cpu", "auto", ("cpu", "gloo")),
        (3, False, "auto", "auto", ("cuda:1", "gloo")),  # ranks share GPUs, which nccl refuses
        (1, False, "auto", "auto", ("cuda:0", "gloo")),
        (1, True, "auto", "auto", ("cuda:0", "nccl")),  # srun --gpus-per-task=1
        (1, True, "cuda", "nccl", ("cuda:0", "nccl")),
        (1, True, "auto", "gloo", ("cuda:0", "gloo")),
        (0, False, "auto", "auto", ("cpu", "gloo")),
        (0, False, "cpu", "gloo", ("cpu", "gloo")),
    ],
)
def test_device_and_backend(
    gpus: Any, count: int, own: bool, device: str, backend: str, expected: tuple[str, str]
) -> None:
    gpus(count, own=own)
    found = read(TORCHRUN, device=device, backend=backend)
    assert (str(found.device), found.backend) == expected
    assert (found.store is not None) == (count > 0 and device != "cpu" and backend != "gloo")


def test_one_gpu_for_several_ranks_is_refused_for_nccl_and_names_two(gpus: Any) -> None:
    gpus(1)
    with pytest.raises(UserError, match="nccl needs a GPU for each rank, but ranks 0 and 1 have the same one"):
        read(TORCHRUN, device="auto", backend="nccl")


@pytest.mark.parametrize(("rank", "own", "backend", "warned"), [
    (0, False, "auto", True), (5, False, "auto", False), (0, True, "auto", False), (0, False, "gloo", False),
])  # fmt: skip
def test_rank_0_warns_where_gpus_end_on_gloo(
    gpus: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, rank: int, own: bool, backend: str,
    warned: bool,
) -> None:  # fmt: skip
    gpus(1, own=own)
    monkeypatch.setitem(TORCHRUN, "RANK", str(rank))
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    read(TORCHRUN, device="auto", backend=backend)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warned
    assert all(message.startswith("ranks 0 and 1 have the same GPU: they communicate by gloo") for message in messages)


def _backend(number: int, rendezvous: str, uuids: list[str]) -> tuple[str, bool]:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    world._device_uuid = lambda _device: uuids[number]
    world._from_slurm = lambda _environ: World(
        rank=number, size=len(uuids), local_rank=number, local_size=len(uuids), rendezvous=rendezvous
    )
    found = world_from_environment(SRUN)
    with world.process_group(replace(found, device=torch.device("cpu"), backend="gloo"), PATIENCE_SECONDS) as store:
        torch.distributed.barrier()
        return found.backend, store is found.store


@pytest.mark.parametrize(("uuids", "backend"), [(["a", "b", "c"], "nccl"), (["a", "b", "a"], "gloo")])
def test_ranks_that_see_one_gpu_each_tell_them_apart(tmp_path: Path, uuids: list[str], backend: str) -> None:
    """Over the store by which they open their process group afterwards."""
    found = in_processes(3, _backend, f"file://{tmp_path}/store", uuids)
    assert found == [(backend, True)] * 3


@pytest.mark.parametrize(
    ("count", "device", "backend", "message"),
    [
        (0, "cuda", "auto", "runtime.device=cuda, but torch sees no GPU"),
        (0, "auto", "nccl", "runtime.backend=nccl, but torch sees no GPU"),
        (3, "auto", "nccl", "runtime.backend=nccl needs a GPU for each of the 4 ranks here, not 3"),
    ],
)
def test_devices_that_are_not_there(gpus: Any, count: int, device: str, backend: str, message: str) -> None:
    gpus(count)
    with pytest.raises(UserError, match=message):
        read(TORCHRUN, device=device, backend=backend)


def test_nccl_has_gloo_beside_it_for_what_is_on_the_host() -> None:
    """NCCL refuses tensors of the CPU, and the encoder's counts are such ones."""
    assert torch_backend(World(size=8, backend="nccl")) == "cpu:gloo,cuda:nccl"
    assert torch_backend(World(size=2, backend="gloo")) == "gloo"


def test_what_nccl_reads_from_the_environment_is_set_where_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "NCCL_GRAPH_REGISTER")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    world._prepare_nccl()
    assert [os.environ[name] for name in names] == ["2000", "2000", "0"]
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")
    world._prepare_nccl()
    assert os.environ["NCCL_GRAPH_REGISTER"] == "1"
