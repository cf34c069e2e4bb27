"""Draws of classes in equal shares: exact in expectation, a function of (seed, epoch), the same on every world size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.config.load import load_config
from dist_train.config.schema import TrainConfig
from dist_train.data.order import BalancedOrder
from dist_train.data.sampler import PositionSampler
from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.tasks.registry import load_task
from dist_train.training.loss import balanced_draws
from dist_train.training.selection import Selection
from tests.dist.sessions import BUILTIN, train
from tests.ranks import on_ranks

CLASSES = st.lists(st.integers(0, 4), min_size=2, max_size=80).map(torch.tensor)


@given(CLASSES, st.integers(0, 2**40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_shares_are_equal_and_rows_of_a_class_come_alike(classes: Tensor, seed: int, epoch: int) -> None:
    order = BalancedOrder(classes, seed)
    drawn = order.rows(epoch, 0, len(classes))
    assert len(drawn) == len(classes)
    occurring = classes.unique()
    shares = torch.bincount(classes[drawn], minlength=5)[occurring]
    assert shares.max() - shares.min() <= 1
    draws = torch.bincount(drawn, minlength=len(classes))
    for index in occurring.tolist():
        own = draws[classes == index]
        assert own.max() - own.min() <= 1
    cut = len(classes) // 3
    again = BalancedOrder(classes, seed)
    assert torch.equal(torch.cat([again.rows(epoch, cut, len(classes)), again.rows(epoch, 0, cut)]), drawn.roll(-cut))


def test_the_expected_draws_of_a_row_are_what_is_said() -> None:
    classes = torch.tensor([0] * 90 + [1] * 7 + [2] * 4)
    order, epochs = BalancedOrder(classes, seed=3), 2000
    draws = torch.zeros(len(classes))
    for epoch in range(epochs):
        draws += torch.bincount(order.rows(epoch, 0, len(classes)), minlength=len(classes))
    expected = balanced_draws(classes, 3)[classes]
    # A row's draws are a fixed number and at most one more: the deviation of a mean is below 0.5 / sqrt(epochs).
    np.testing.assert_allclose(draws / epochs, expected, rtol=0, atol=6 * 0.5 / epochs**0.5)
    assert expected.sum().item() == pytest.approx(len(classes))


@given(CLASSES, st.sampled_from([1, 2, 3]), st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_the_ranks_share_the_draws_and_resume_at_any_step(classes: Tensor, world: int, batch: int) -> None:
    def sampler(rank: int) -> PositionSampler:
        return PositionSampler(
            len(classes), rank=rank, world_size=world, seed=5, global_batch_size=batch, classes=classes
        )

    samplers, position, rows = [sampler(rank) for rank in range(world)], Position(), []
    while position.epoch == 0:
        rows += [share.rows for one in samplers for share in one.shares(position)]
        fresh = sampler(world - 1)  # one that begins here
        assert torch.equal(fresh.shares(position)[0].rows, rows[-1])
        position = samplers[0].step_end(position)
    assert torch.equal(torch.cat(rows), BalancedOrder(classes, 5).rows(0, 0, len(classes)))


def task_of(*arguments: str) -> Any:
    return load_task(load_config([*BUILTIN, *arguments]), Collectives(World()))


def test_reweighted_draws_have_the_expected_loss_of_the_table() -> None:
    task = task_of("train.class_sampling=balanced_reweighted")
    targets = task.splits["train"].targets
    logits = torch.randn((len(targets), 3), generator=torch.Generator().manual_seed(1))
    losses = F.cross_entropy(logits, targets, reduction="none")
    draws = balanced_draws(targets, 3)[targets]
    of_rows = [task.objective()(logits[i : i + 1], targets[i : i + 1], (1,)) for i in range(40)]
    for i, found in enumerate(of_rows):
        assert (found.loss.item(), found.weight.item()) == pytest.approx(
            ((losses[i] / draws[i]).item(), (1 / draws[i]).item()), rel=1e-5
        )


def test_what_chooses_is_the_loss_of_the_draws() -> None:
    assert Selection.of(TrainConfig(class_sampling="balanced")).metric == "objective"
    assert Selection.of(TrainConfig(class_sampling="balanced_reweighted")).metric == "loss"
    task = task_of("train.class_sampling=balanced")
    p = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(3), size=30))
    y = torch.arange(30) % 3
    weights = balanced_draws(task.splits["train"].targets, 3)[y]
    expected = -(weights * p[torch.arange(30), y].log()).sum() / weights.sum()
    assert task.metrics(p, y)["objective"] == pytest.approx(expected.item(), rel=1e-5)


def test_mistakes() -> None:
    with pytest.raises(
        UserError, match=r"train\.class_sampling: must be null, balanced or balanced_reweighted, is 'up'"
    ):
        load_config(["train.class_sampling=up"])
    with pytest.raises(UserError, match=r"draws from all rows: data\.shuffle_block_rows must be null"):
        load_config(["train.class_sampling=balanced", "data.shuffle_block_rows=64"])


def test_the_exact_mode_draws_the_same_bits_on_every_world_size() -> None:
    job = [
        *BUILTIN, "train.class_sampling=balanced_reweighted", "train.virtual_ranks=4", "train.max_steps=12",
        "train.global_batch_size=500", "train.ema_decay=0.9",
    ]  # fmt: skip
    (alone,) = on_ranks(1, train, job)
    for trained in on_ranks(2, train, job):
        assert trained.losses.tobytes() == alone.losses.tobytes()
        assert all(trained.average[name].tobytes() == value.tobytes() for name, value in alone.average.items())
