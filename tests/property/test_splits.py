"""Splits by time and by group: what they promise, for any table."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.data.splits.split import IN_NONE, SPLITS, Parts
from dist_train.data.splits.split_by_group import GroupRows, GroupSplit
from dist_train.data.splits.split_by_time import TimeSplit
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World

ALONE = Collectives(World())
TRAIN, VALID, TEST = range(len(SPLITS))
SHARES = st.sampled_from([(0.15, 0.15), (0.3, 0.1), (0.0, 0.25), (0.2, 0.0), (0.4, 0.4)])
TIMES = st.lists(st.one_of(st.integers(0, 5), st.integers(-(2**62), 2**62)), min_size=1, max_size=80)
GROUPS = st.lists(st.tuples(st.integers(-30, 30), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=120)
FOLDS = st.one_of(st.none(), st.integers(2, 4))


def by_time(times: Tensor, parts: Parts, cut: int | None = None) -> Tensor:
    pieces = [times] if cut is None else [times[:cut], times[cut:]]
    return TimeSplit.fit(lambda: pieces, ALONE, borders=parts.borders).parts(times)


def by_group(rows: list[tuple[int, int, int]], parts: Parts, *, with_time: bool, cut: int = 0, seed: int = 0) -> Tensor:
    groups, classes, times = torch.tensor(rows, dtype=torch.int64).T.contiguous()
    pieces = [
        GroupRows(groups[span], classes[span], times[span] if with_time else None)
        for span in (slice(0, cut), slice(cut, None))
    ]
    return GroupSplit.fit(lambda: pieces, ALONE, borders=parts.borders, seed=seed).parts(groups)


@given(TIMES, SHARES, FOLDS, st.integers(0, 80))
@settings(max_examples=60, deadline=None)
def test_time_is_kept_ties_are_not_cut_and_borders_are_the_nearest(
    cells: list[int], shares: tuple[float, float], folds: int | None, cut: int
) -> None:
    times = torch.tensor(cells)
    parts = Parts(*shares, folds, 0 if folds else None, in_time=True)
    found = by_time(times, parts)
    assert torch.equal(found, by_time(times, parts, cut))
    distinct = sorted(set(cells))
    of_times = [found[times == time].unique().tolist() for time in distinct]
    assert all(len(of_time) == 1 for of_time in of_times)
    assert of_times == sorted(of_times, reverse=True)  # the first part is the latest
    possible = [int((times >= time).sum()) for time in [*distinct, 2**63 - 1]]
    for border, wish in enumerate(parts.borders(len(cells))):
        reached = int((found <= border).sum())
        assert abs(reached - wish) == min(abs(count - wish) for count in possible)


@given(GROUPS, SHARES, FOLDS, st.booleans(), st.integers(0, 120), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_group_is_in_one_part_in_whatever_order_its_rows_come(
    rows: list[tuple[int, int, int]],
    shares: tuple[float, float],
    folds: int | None,
    with_time: bool,
    cut: int,
    random: object,
) -> None:
    parts = Parts(*shares, folds, 0 if folds else None, in_time=with_time)
    found = by_group(rows, parts, with_time=with_time)
    assert torch.equal(found, by_group(rows, parts, with_time=with_time, cut=cut))
    of_groups = {row[0]: part for row, part in zip(rows, found.tolist(), strict=True)}
    assert [of_groups[row[0]] for row in rows] == found.tolist()
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = by_group(shuffled, parts, with_time=with_time)
    assert {row[0]: part for row, part in zip(shuffled, again.tolist(), strict=True)} == of_groups


@given(GROUPS, SHARES, FOLDS)
@settings(max_examples=60, deadline=None)
def test_groups_in_time_are_split_by_their_last_row(
    rows: list[tuple[int, int, int]], shares: tuple[float, float], folds: int | None
) -> None:
    found = by_group(rows, Parts(*shares, folds, 0 if folds else None, in_time=True), with_time=True).tolist()
    last: dict[int, int] = {}
    for group, _, time in rows:
        last[group] = max(time, last.get(group, time))
    in_order = sorted((last[row[0]], -part) for row, part in zip(rows, found, strict=True))
    assert [part for _, part in in_order] == sorted(part for _, part in in_order)
    assert len({(time, part) for time, part in in_order}) == len({time for time, _ in in_order})


@given(st.integers(0, 1000), SHARES)
@settings(max_examples=20, deadline=None)
def test_shares_of_groups_are_near_the_wish_in_every_class(seed: int, shares: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 8, (400,), generator=generator)
    groups = torch.arange(400).repeat_interleave(sizes)
    classes = (torch.arange(400) % 10 == 0).long().repeat_interleave(sizes)
    parts = Parts(*shares)
    split = GroupSplit.fit(lambda: [GroupRows(groups, classes, None)], ALONE, borders=parts.borders, seed=seed)
    found = split.parts(groups)
    for name in (0, 1):
        of_class = found[classes == name]
        for part, share in enumerate((shares[1], shares[0])):
            assert abs(int((of_class == part).sum()) - share * len(of_class)) <= 8
    assert GroupSplit.unpack(split.pack()).parts(groups).equal(found)


@given(st.integers(2, 6), st.booleans())
def test_every_row_validates_once_over_the_folds(folds: int, in_time: bool) -> None:
    codes = torch.stack([Parts(0.1, 0.1, folds, fold, in_time).codes for fold in range(folds)])
    assert (codes[:, 0] == TEST).all()
    validated = (codes == VALID).sum(0).tolist()
    if in_time:
        assert validated == [0, *([1] * folds), 0]  # all but the earliest window
        for fold in range(folds):
            valid = int((codes[fold] == VALID).nonzero())
            assert (codes[fold, valid + 1 :] == TRAIN).all()
            assert (codes[fold, 1:valid] == IN_NONE).all()
    else:
        assert validated == [0, *([1] * folds)]
        assert not (codes == IN_NONE).any()
