"""Batches from rows in memory: one gather is the rows themselves."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from dist_train.data.encoding.encoder import Inputs
from dist_train.data.sampler import MicroBatchIndices, PositionSampler
from dist_train.data.sources import Feed, ResidentRows, resident
from dist_train.determinism.batch_context import BatchContext
from dist_train.determinism.position import Position

CPU = torch.device("cpu")
NUMERIC = torch.arange(60.0).view(20, 3)
FLAGS = torch.empty((20, 0), dtype=torch.uint8)
CODES = torch.arange(40, dtype=torch.uint8).view(20, 2)
TARGETS = torch.arange(20) % 4


def rows(*numbers: int, dtype: torch.dtype = torch.float32) -> ResidentRows:
    chosen = torch.tensor(numbers, dtype=torch.int64)
    return resident(Inputs(NUMERIC[chosen], FLAGS[chosen], CODES[chosen]), TARGETS[chosen], chosen, 4, CPU, dtype)


@pytest.mark.parametrize("index", [[], [4], [0, 4, 2], [1, 1]])
def test_a_batch_is_direct_indexing(index: list[int]) -> None:
    chosen = rows(19, 3, 5, 7, 11)
    share = MicroBatchIndices(
        torch.tensor(index, dtype=torch.int64), (len(index),), epoch=2, first_row=7, global_rows=9
    )
    batch = chosen.gather(share)
    table_rows = [[19, 3, 5, 7, 11][i] for i in index]
    numeric, flags, codes = batch.inputs
    assert torch.equal(numeric, NUMERIC[table_rows])
    assert torch.equal(flags, FLAGS[table_rows])
    assert torch.equal(codes, CODES[table_rows])
    assert torch.equal(batch.targets, TARGETS[table_rows])
    assert batch.rows.tolist() == table_rows
    assert batch.context == BatchContext(2, 7, (len(index),))
    assert batch.global_rows == 9
    assert batch.inputs[0].shape == (len(index), 3)


def test_only_floating_point_inputs_change_their_type() -> None:
    batch = rows(1, 2, dtype=torch.float64).gather(MicroBatchIndices(torch.tensor([0]), (1,), 0, 0, 1))
    assert batch.inputs[0].dtype == torch.float64
    assert batch.inputs[1].dtype == batch.inputs[2].dtype == torch.uint8
    assert batch.targets.dtype == torch.int64


def test_a_slice_is_in_the_order_of_the_table() -> None:
    numeric, flags, codes = rows(2, 4, 6).slice(1, 3)
    assert torch.equal(numeric, NUMERIC[[4, 6]])
    assert flags.shape == (2, 0)
    assert torch.equal(codes, CODES[[4, 6]])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_ranks_together_feed_the_batches_of_one_process(world_size: int) -> None:
    def feed(rank: int, size: int) -> Feed:
        sampler = PositionSampler(20, rank=rank, world_size=size, seed=1, global_batch_size=6, accumulation_steps=2)
        return Feed(rows(*range(20)), sampler)

    start = Position(0, 12)
    whole = list(islice(feed(0, 1).steps(start), 8))
    parts = [list(islice(feed(rank, world_size).steps(start), 8)) for rank in range(world_size)]
    for step, (batches, after) in enumerate(whole):
        assert all(of_rank[step][1] == after for of_rank in parts)
        for number, batch in enumerate(batches):
            shares = [of_rank[step][0][number] for of_rank in parts]
            assert torch.equal(torch.cat([share.inputs[0] for share in shares]), batch.inputs[0])
            assert torch.equal(torch.cat([share.targets for share in shares]), batch.targets)
            assert all(share.global_rows == len(batch.targets) for share in shares)


def test_it_feeds_without_end() -> None:
    feed = Feed(rows(*range(20)), PositionSampler(20, rank=0, world_size=1, seed=1, global_batch_size=6))
    positions = [after for _, after in islice(feed.steps(Position()), 9)]
    assert positions[:4] == [Position(0, 6), Position(0, 12), Position(0, 18), Position(1, 0)]
    assert positions[-1] == Position(2, 6)
    assert feed.num_rows == 20
    assert feed.steps_per_epoch == 4
