"""Every row once per epoch, at any world size, from any position."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.data.order import WINDOW_BLOCKS, BlockOrder
from dist_train.data.sampler import PositionSampler
from dist_train.determinism.position import Position, split_evenly

PLANS = st.builds(
    dict,
    num_rows=st.integers(2, 200),
    global_batch_size=st.integers(2, 70),
    accumulation_steps=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
)
WORLDS = st.integers(1, 7)


def samplers(plan: dict[str, Any], world_size: int, position: Position | None = None) -> list[PositionSampler]:
    at = {"position": position} if position else {}
    return [PositionSampler(**plan, rank=rank, world_size=world_size, **at) for rank in range(world_size)]


def steps_of(plan: dict[str, Any], world_size: int, epoch: int) -> list[list[list[Tensor]]]:
    """Rows by step, pass and rank, from the start of an epoch to its end."""
    ranks = samplers(plan, world_size)
    steps, position = [], Position(epoch, 0)
    while position.epoch == epoch:
        shares = [sampler.shares(position) for sampler in ranks]
        assert len({len(of_rank) for of_rank in shares}) == 1
        steps.append([[share.rows for share in of_pass] for of_pass in zip(*shares, strict=True)])
        position = ranks[0].step_end(position)
    assert position == Position(epoch + 1, 0)
    return steps


@settings(deadline=None, max_examples=100)
@given(PLANS, WORLDS, st.integers(0, 3))
def test_every_row_is_trained_once_per_epoch(plan: dict[str, int], world_size: int, epoch: int) -> None:
    steps = steps_of(plan, world_size, epoch)
    rows = torch.cat([rows for step in steps for of_pass in step for rows in of_pass])
    assert rows.sort().values.tolist() == list(range(plan["num_rows"]))
    assert len(steps) == samplers(plan, 1)[0].steps_per_epoch


@settings(deadline=None, max_examples=100)
@given(PLANS, WORLDS)
def test_ranks_in_order_hold_the_batches_of_one_process(plan: dict[str, int], world_size: int) -> None:
    several, one = steps_of(plan, world_size, 1), steps_of(plan, 1, 1)
    assert len(several) == len(one)
    for step, whole in zip(several, one, strict=True):
        assert [torch.cat(of_pass).tolist() for of_pass in step] == [of_pass[0].tolist() for of_pass in whole]


@settings(deadline=None, max_examples=100)
@given(PLANS, WORLDS)
def test_batches_are_full_but_for_the_last_and_shares_are_even(plan: dict[str, int], world_size: int) -> None:
    steps = steps_of(plan, world_size, 0)
    sizes = [sum(len(rows) for of_pass in step for rows in of_pass) for step in steps]
    batch = plan["global_batch_size"]
    assert all(size == batch for size in sizes[:-1])
    assert 2 <= sizes[-1] <= batch + 1
    for step in steps:
        passes = [sum(len(rows) for rows in of_pass) for of_pass in step]
        assert min(passes) >= 2
        assert max(passes) - min(passes) <= 1
        assert len(passes) <= plan["accumulation_steps"]
        for of_pass in step:
            lengths = [len(rows) for rows in of_pass]
            assert max(lengths) - min(lengths) <= 1


@settings(deadline=None, max_examples=60)
@given(PLANS, WORLDS, WORLDS, st.data())
def test_from_any_position_on_any_world_the_same_rows_follow(
    plan: dict[str, int], before: int, after: int, data: st.DataObject
) -> None:
    steps = steps_of(plan, before, 2)
    done = data.draw(st.integers(0, len(steps) - 1))
    position = Position(2, 0)
    for _ in range(done):
        position = samplers(plan, before)[0].step_end(position)
    rest = [torch.cat([rows for of_pass in step for rows in of_pass]).tolist() for step in steps[done:]]
    resumed = samplers(plan, after, position)
    assert resumed[0].position == position
    found = []
    while position.epoch == 2:
        shares = zip(*(sampler.shares(position) for sampler in resumed), strict=True)
        found.append(torch.cat([share.rows for of_pass in shares for share in of_pass]).tolist())
        position = resumed[0].step_end(position)
    assert found == rest


@settings(deadline=None, max_examples=60)
@given(PLANS, WORLDS)
def test_a_share_says_where_in_the_epoch_it_stands(plan: dict[str, int], world_size: int) -> None:
    ranks = samplers(plan, world_size)
    order = ranks[0].order(3)
    position = Position(3, 0)
    while position.epoch == 3:
        for of_pass in zip(*(sampler.shares(position) for sampler in ranks), strict=True):
            for share in of_pass:
                assert torch.equal(order[share.first_row : share.first_row + len(share.rows)], share.rows)
                assert share.epoch == 3
                assert share.global_rows == sum(len(other.rows) for other in of_pass)
        position = ranks[0].step_end(position)


@settings(deadline=None, max_examples=60)
@given(PLANS, WORLDS)
def test_as_an_iterable_it_goes_on_to_the_next_epoch_by_itself(plan: dict[str, int], world_size: int) -> None:
    ranks = samplers(plan, world_size)
    for epoch in (0, 1):
        expected_lengths = [len(sampler) for sampler in ranks]
        rows = [list(sampler) for sampler in ranks]
        assert [len(of_rank) for of_rank in rows] == expected_lengths
        assert sorted(row for of_rank in rows for row in of_rank) == list(range(plan["num_rows"]))
        steps = steps_of(plan, world_size, epoch)
        for rank, of_rank in enumerate(rows):
            assert of_rank == [row for step in steps for of_pass in step for row in of_pass[rank].tolist()]


@settings(deadline=None, max_examples=200)
@given(st.integers(-1000, 1000), st.integers(0, 1000), st.integers(1, 20))
def test_a_cut_covers_everything_once_and_evenly(start: int, length: int, pieces: int) -> None:
    parts = split_evenly(start, start + length, pieces)
    assert len(parts) == pieces
    assert [i for begin, end in parts for i in range(begin, end)] == list(range(start, start + length))
    lengths = [end - begin for begin, end in parts]
    assert max(lengths) - min(lengths) <= 1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_the_order_in_blocks_has_every_row_once(num_rows: int, block_rows: int, seed: int, epoch: int) -> None:
    order = BlockOrder(num_rows, block_rows, seed).rows(epoch, 0, num_rows)
    assert order.sort().values.tolist() == list(range(num_rows))
    assert torch.equal(order, BlockOrder(num_rows, block_rows, seed).rows(epoch, 0, num_rows))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 20), st.data())
def test_a_piece_of_the_order_in_blocks_is_that_piece_of_the_whole(
    num_rows: int, block_rows: int, data: st.DataObject
) -> None:
    asked, whole = BlockOrder(num_rows, block_rows, 7), BlockOrder(num_rows, block_rows, 7)
    for _ in range(4):
        epoch = data.draw(st.integers(0, 2))
        begin = data.draw(st.integers(0, num_rows))
        end = data.draw(st.integers(begin, num_rows))
        assert torch.equal(asked.rows(epoch, begin, end), whole.rows(epoch, 0, num_rows)[begin:end])


def test_a_batch_of_the_order_in_blocks_comes_from_one_window_and_from_all_of_its_blocks() -> None:
    order = BlockOrder(200_000, 1000, 3)
    batch = order.rows(1, 1024, 2048)
    blocks = set((batch // 1000).tolist())
    assert len(blocks) == WINDOW_BLOCKS
    assert blocks == set((order.rows(1, 0, 64_000) // 1000).tolist())
    assert not torch.equal(order.rows(0, 0, 5000), order.rows(1, 0, 5000))


@settings(deadline=None, max_examples=40)
@given(PLANS, WORLDS, st.integers(1, 9))
def test_in_blocks_too_every_row_is_trained_once_on_any_world(
    plan: dict[str, int], world_size: int, block_rows: int
) -> None:
    in_blocks = plan | {"shuffle_block_rows": block_rows}
    several, one = steps_of(in_blocks, world_size, 1), steps_of(in_blocks, 1, 1)
    rows = torch.cat([rows for step in several for of_pass in step for rows in of_pass])
    assert rows.sort().values.tolist() == list(range(plan["num_rows"]))
    assert [[torch.cat(p).tolist() for p in step] for step in several] == [[p[0].tolist() for p in s] for s in one]


@settings(deadline=None, max_examples=100)
@given(PLANS, WORLDS, st.integers(1, 300), st.integers(1, 4))
def test_a_pass_has_no_more_tokens_than_its_budget_on_any_number_of_ranks(
    plan: dict[str, int], world_size: int, budget: int, sort_batches: int
) -> None:
    lengths = torch.randint(1, 60, (plan["num_rows"],), generator=torch.Generator().manual_seed(plan["num_rows"]))
    texts = plan | {"lengths": lengths, "padded_lengths": lengths, "sort_batches": sort_batches}
    without, within = steps_of(texts, world_size, 1), steps_of(texts | {"tokens_per_pass": budget}, world_size, 1)
    assert len(within) == len(without)
    for step, plain in zip(within, without, strict=True):
        passes = [torch.cat(of_pass) for of_pass in step]
        assert torch.cat(passes).tolist() == torch.cat([rows for of_pass in plain for rows in of_pass]).tolist()
        assert len(passes) >= len(plain)
        for rows in passes:
            assert len(rows) >= 2
            assert len(rows) <= 3 or int(lengths[rows].max()) * len(rows) <= budget
        fits = all(int(lengths[torch.cat(of_pass)].max()) * len(torch.cat(of_pass)) <= budget for of_pass in plain)
        assert not fits or len(passes) == len(plain)
