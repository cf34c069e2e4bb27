"""A step that draws from a global generator is refused, in every mode."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.load import load_config
from dist_train.determinism.guard import GeneratorGuard
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task
from tests.dist.sessions import BUILTIN

CPU = torch.device("cpu")
MODES = [(), ("train.virtual_ranks=2",), ("train.precision=bf16",)]


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: torch.rand(1), "torch's global CPU generator"),
        (lambda: F.dropout(torch.ones(3), 0.5), "torch's global CPU generator"),
        (lambda: nn.init.normal_(torch.empty(3)), "torch's global CPU generator"),
        (lambda: random.random(), "Python's random"),
        (lambda: np.random.permutation(3), "numpy's global generator"),
    ],
)
def test_a_draw_is_named_with_its_step(draw: Callable[[], object], named: str) -> None:
    guard = GeneratorGuard(CPU)
    with guard.watching(1):
        pass
    draw()  # between steps
    if not named.startswith("torch"):  # once it may have been a thread of a library
        with guard.watching(2):
            draw()
    with pytest.raises(UserError, match="step 3 has drawn from") as refused, guard.watching(3):
        draw()
    assert named in str(refused.value)
    with guard.watching(4):
        pass


def test_torch_is_watched_in_every_step_and_a_private_generator_is_no_draw() -> None:
    guard = GeneratorGuard(CPU)
    for step in range(1, 60):
        with guard.watching(step):
            torch.rand(2, generator=torch.Generator().manual_seed(step))
            np.random.default_rng(step).random()
    with pytest.raises(UserError, match="step 60"), guard.watching(60):
        torch.rand(1)
    with guard.watching(100):
        random.random()
    with pytest.raises(UserError, match="step 101"), guard.watching(101):
        random.random()


class Unkeyed(nn.Module):
    """Dropout as a function: nobody can make it keyed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = F.dropout(self.inner(*inputs), 0.1, self.training)
        return logits


@pytest.mark.parametrize("mode", MODES)
def test_a_model_with_unkeyed_dropout_is_refused_at_its_first_step(
    mode: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    collectives, config = Collectives(World()), load_config([*BUILTIN, "model.hidden_dim=8", *mode])
    task = load_task(config, collectives)
    plain = task.model
    monkeypatch.setattr(task, "model", lambda device: Unkeyed(plain(device)))
    # The exact mode finds what the container computes itself before the first step.
    words = "step 1 has drawn from torch's global CPU generator|the forward of .* itself computes"

    def take_a_step() -> None:
        session = Session(config, task, collectives)
        batches, _ = next(session.feed.steps(session.progress.position))
        session.step(batches, 0, wants_stop=False)

    with pytest.raises(UserError, match=words):
        take_a_step()
