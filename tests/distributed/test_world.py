"""Environment -> world, for each way of starting and each way of getting it half right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_train.distributed.world import World, torch_backend, world_from_environment
from dist_train.errors import UserError
from dist_train.system.torchrun import TORCHRUN_VARIABLES

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
    world = read(TORCHRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert (world.rendezvous, world.backend, world.device.type) == ("env://", "gloo", "cpu")


def test_torchrun_under_srun_wins() -> None:
    """SLURM_* describe the agent there, not the rank."""
    assert read(SRUN | TORCHRUN) == read(TORCHRUN)


def test_srun() -> None:
    world = read(SRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 6, 1, 2)
    assert world.rendezvous == "tcp://gpu03:23456"
    assert read(SRUN | {"MASTER_ADDR": "left over"}) == world


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
    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    ("count", "device", "backend", "expected"),
    [
        (4, "auto", "auto", ("cuda:1", "nccl")),
        (4, "cuda", "nccl", ("cuda:1", "nccl")),
        (4, "auto", "gloo", ("cuda:1", "gloo")),
        (4, "cpu", "auto", ("cpu", "gloo")),
        (3, "auto", "auto", ("cuda:1", "gloo")),  # ranks share GPUs, which nccl refuses
        (1, "auto", "auto", ("cuda:0", "gloo")),
        (0, "auto", "auto", ("cpu", "gloo")),
        (0, "cpu", "gloo", ("cpu", "gloo")),
    ],
)
def test_device_and_backend(gpus: Any, count: int, device: str, backend: str, expected: tuple[str, str]) -> None:
    gpus(count)
    world = read(TORCHRUN, device=device, backend=backend)
    assert (str(world.device), world.backend) == expected


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
