"""The sampler in a torch DataLoader, and its corners. Its laws are in tests/property."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dist_train.data.sampler import PositionSampler, steps_of_epoch
from dist_train.determinism.position import Position
from dist_train.errors import UserError


def sampler(num_rows: int, batch: int, *, rank: int = 0, world_size: int = 1, **more: int) -> PositionSampler:
    return PositionSampler(num_rows, rank=rank, world_size=world_size, global_batch_size=batch, **{"seed": 4} | more)


def test_it_is_a_distributed_sampler() -> None:
    assert isinstance(sampler(10, 4), DistributedSampler)


@pytest.mark.parametrize(
    ("num_rows", "batch", "steps"),
    [(2, 2, 1), (3, 2, 1), (4, 2, 2), (5, 2, 2), (8, 4, 2), (9, 4, 2), (10, 4, 3), (2, 100, 1), (101, 100, 1)],
)
def test_a_tail_of_one_row_joins_the_batch_before(num_rows: int, batch: int, steps: int) -> None:
    assert steps_of_epoch(num_rows, batch) == steps
    one = sampler(num_rows, batch)
    position, sizes = Position(), []
    while position.epoch == 0:
        sizes.append(sum(len(share.rows) for share in one.shares(position)))
        position = one.step_end(position)
    assert len(sizes) == steps
    assert sum(sizes) == num_rows
    assert 1 not in sizes


def test_a_data_loader_sees_every_row_once_over_all_ranks_and_another_order_each_epoch() -> None:
    rows = TensorDataset(torch.arange(53))
    loaders = [DataLoader(rows, batch_size=8, sampler=sampler(53, 16, rank=r, world_size=3)) for r in range(3)]
    epochs = []
    for _ in range(3):
        seen = [torch.cat([batch for (batch,) in loader]).tolist() for loader in loaders]
        assert sorted(row for of_rank in seen for row in of_rank) == list(range(53))
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_set_epoch_starts_an_epoch_over() -> None:
    one = sampler(53, 16)
    epochs = [list(one) for _ in range(3)]
    one.set_epoch(1)
    assert list(one) == epochs[1]
    assert list(one) == epochs[2]


def test_its_length_counts_what_is_left() -> None:
    one = PositionSampler(53, rank=0, world_size=1, seed=0, global_batch_size=16, position=Position(2, 32))
    assert len(one) == 21
    assert list(one) == one.order(2)[32:].tolist()
    assert len(one) == 53


def test_seed_and_epoch_alone_decide_the_order() -> None:
    assert torch.equal(sampler(100, 16).order(1), sampler(100, 7, rank=1, world_size=2).order(1))
    assert not torch.equal(sampler(100, 16).order(1), sampler(100, 16).order(2))
    assert not torch.equal(sampler(100, 16, seed=1).order(1), sampler(100, 16, seed=2).order(1))


def test_the_global_generator_has_no_say_and_is_left_alone() -> None:
    torch.manual_seed(1)
    first, state = sampler(100, 16).order(0), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, sampler(100, 16).order(0))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_beyond_the_rows_get_empty_shares() -> None:
    lengths = [[len(s.rows) for s in sampler(2, 2, rank=r, world_size=5).shares(Position())] for r in range(5)]
    assert sum(sum(of_rank) for of_rank in lengths) == 2
    assert [0] in lengths


def test_one_row_is_too_few() -> None:
    with pytest.raises(UserError, match="1 training rows"):
        sampler(1, 4)
