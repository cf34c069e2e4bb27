"""Which execution computes a job's steps, and in which order a recorded one prepares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.schema import TrainConfig
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.choose import choose_execution
from dist_train.execution.ddp import DDPExecution
from dist_train.execution.exact import ExactExecution
from dist_train.execution.recorded import GpuExecution, GraphStep
from dist_train.execution.single import SingleExecution
from tests.dist.sessions import BUILTIN, build
from tests.execution.test_recorded import Repeater


class OnDevice:
    """Collectives of ranks whose work runs on a GPU, as far as the choice asks."""

    size, device, runs_on_device = 2, torch.device("cuda"), True


@pytest.mark.parametrize(
    ("train", "size", "expected"),
    [
        (TrainConfig(), 1, SingleExecution),
        (TrainConfig(), 2, DDPExecution),
        (TrainConfig(virtual_ranks=4), 1, ExactExecution),
        (TrainConfig(virtual_ranks=4), 2, ExactExecution),
    ],
)
def test_the_mode_follows_from_configuration_and_world(train: TrainConfig, size: int, expected: type) -> None:
    collectives = Collectives(World(size=size, local_size=size))
    assert type(choose_execution(train, collectives, seed=0, rows_on_device=True)) is expected


def test_a_gpu_has_kernels_of_its_own_on_any_backend_and_wherever_the_rows_are() -> None:
    collectives: Any = OnDevice()

    def chosen(train: TrainConfig, *, rows_on_device: bool = True) -> type:
        return type(choose_execution(train, collectives, seed=0, rows_on_device=rows_on_device))

    for runs_on_device in (True, False):  # ranks that share a GPU sum over the host
        collectives.runs_on_device = runs_on_device
        for rows_on_device in (True, False):
            assert chosen(TrainConfig(), rows_on_device=rows_on_device) is GpuExecution
            assert chosen(TrainConfig(virtual_ranks=2), rows_on_device=rows_on_device) is GpuExecution
    assert chosen(TrainConfig(accumulation_steps=2)) is DDPExecution
    assert chosen(TrainConfig(virtual_ranks=2, accumulation_steps=2)) is ExactExecution


def test_only_steps_that_run_wholly_on_the_device_are_recorded() -> None:
    def recorded(*, recorder: Any, rows_on_device: bool) -> bool:
        session = build(Collectives(World()), BUILTIN)
        execution = GpuExecution(session.execution, recorder, rows_on_device=rows_on_device)
        return isinstance(execution.step(eager_of(session)), GraphStep)

    assert recorded(recorder=Repeater(), rows_on_device=True)
    assert not recorded(recorder=Repeater(), rows_on_device=False)
    assert not recorded(recorder=None, rows_on_device=True)


def eager_of(session: Any) -> Any:
    return session.step.inner


def test_the_stream_is_chosen_before_anything_of_the_model_is_prepared() -> None:
    """DistributedDataParallel's hooks belong to the stream on which it is built."""
    order: list[str] = []

    class Recorder(Repeater):
        def use_stream(self) -> None:
            order.append("stream")

    class Inner(SingleExecution):
        def prepare(self, model: nn.Module, sample: Any, name: str) -> nn.Module:
            order.append("prepare")
            return super().prepare(model, sample, name)

    collectives = Collectives(World())
    inner = Inner(collectives, choose_execution(TrainConfig(), collectives, seed=0, rows_on_device=True).context)
    GpuExecution(inner, Recorder(), rows_on_device=True).prepare(nn.Linear(2, 2), (torch.zeros(1, 2),), "a model")
    assert order == ["stream", "prepare"]
