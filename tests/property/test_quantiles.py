"""Quantiles counted in pieces are the quantiles of the whole, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.data.quantiles import exact_quantiles
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
LARGEST = float(np.finfo(np.float64).max)

FLOATS = st.one_of(
    # Half the range, so that the difference of any two is a number; the whole range has a test of its own.
    st.floats(min_value=-LARGEST / 2, max_value=LARGEST / 2),
    # Duplicates, both zeros, subnormals and extremes, more often than chance brings them.
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 2.2250738585072014e-308, LARGEST / 2, -LARGEST / 2, 0.1]),
    # Keys that differ in their last digit alone.
    st.integers(-3, 3).map(lambda i: 1 + i * 2**-52),
    st.integers(0, 59).map(lambda i: 1.7e9 + i),
)


class OneOfSeveral(Collectives):
    """A rank that takes its sums from `add_up`."""

    def __init__(self, add_up: Callable[[Tensor], Tensor]) -> None:
        super().__init__(World())
        self.add_up = add_up

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.add_up(tensor)


def in_one_piece(values: Tensor) -> Tensor:
    return exact_quantiles(lambda: [[values.double()]], 1, FRACTIONS, Collectives(World()))[0][0]


def in_pieces(pieces: list[Tensor]) -> Tensor:
    """As several ranks would: the sums over pieces are recorded first, then every piece is asked with them at hand."""
    sums: list[Tensor] = []
    result = torch.empty(0)
    while True:
        contributions = []

        def add_up(counts: Tensor, call: list[int], contributions: list[Tensor] = contributions) -> Tensor:
            call[0] += 1
            if call[0] <= len(sums):
                return sums[call[0] - 1]
            contributions.append(counts)
            raise _Waiting

        for piece in pieces:
            call = [0]
            rank = OneOfSeveral(lambda counts, call=call: add_up(counts, call))
            parts = [[part] for part in piece.double().split(7)]  # and each rank's piece comes in parts
            try:
                result = exact_quantiles(lambda parts=parts: parts, 1, FRACTIONS, rank)[0][0]
            except _Waiting:
                continue
        if not contributions:
            return result
        sums.append(torch.stack(contributions).sum(0))


class _Waiting(Exception):
    """A rank waits for the others."""


def numpy_quantiles(values: Tensor) -> Tensor:
    """Linear interpolation between neighbours, written out: numpy's order statistics, float64 arithmetic."""
    ordered = np.sort(values.double().numpy())
    places = np.array([f * (len(ordered) - 1) for f in FRACTIONS])
    below, above = ordered[np.floor(places).astype(int)], ordered[np.ceil(places).astype(int)]
    return torch.from_numpy(below + (above - below) * (places - np.floor(places)))


@example([0.0, 5e-324])
@settings(deadline=None, max_examples=80)
@given(st.lists(FLOATS, min_size=1, max_size=60))
def test_they_equal_numpy(values: list[float]) -> None:
    column = torch.tensor(values, dtype=torch.float64)
    found = in_one_piece(column)
    assert torch.equal(found, numpy_quantiles(column))
    reference = np.quantile(column.numpy(), FRACTIONS)
    # numpy's own interpolation rounds at another place, among subnormals by a unit of 5e-324.
    np.testing.assert_allclose(found.numpy(), reference, rtol=1e-15, atol=column.abs().max().item() * 1e-15 + 1e-323)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(FLOATS, max_size=20), min_size=1, max_size=4))
def test_the_cut_into_pieces_does_not_matter(pieces: list[list[float]]) -> None:
    columns = [torch.tensor(piece, dtype=torch.float64) for piece in pieces]
    assert torch.equal(in_pieces(columns).nan_to_num(nan=7e77), in_one_piece(torch.cat(columns)).nan_to_num(nan=7e77))


def test_order_statistics_of_an_odd_count_are_values_of_the_column() -> None:
    column = torch.randn(1001, generator=torch.Generator().manual_seed(0)) * 1e5
    ordered = column.sort().values
    assert in_one_piece(column).tolist() == [ordered[i].item() for i in (0, 250, 500, 750, 1000)]


def test_every_bit_of_float64_counts() -> None:
    timestamps = 1.7e9 + torch.arange(60, dtype=torch.float64).flip(0)
    assert in_one_piece(timestamps).tolist() == [1.7e9, 1.7e9 + 14.75, 1.7e9 + 29.5, 1.7e9 + 44.25, 1.7e9 + 59]
    neighbours = torch.tensor([1 + i * 2**-52 for i in (4, 0, 3, 1, 2)], dtype=torch.float64)
    assert in_one_piece(-neighbours).tolist() == [-(1 + i * 2**-52) for i in (4, 3, 2, 1, 0)]


def test_the_whole_range_of_float64_is_in_order() -> None:
    ordered = [-LARGEST, -1.0, -5e-324, 5e-324, LARGEST]
    assert in_one_piece(torch.tensor(ordered, dtype=torch.float64).flip(0)).tolist() == ordered


def test_float32_values_count_as_what_they_are() -> None:
    coarse = torch.tensor([0.1, 0.2, 1 / 3], dtype=torch.float32)
    assert torch.equal(in_one_piece(coarse), in_one_piece(coarse.double()))


def test_no_values_give_nan() -> None:
    assert in_one_piece(torch.empty(0)).isnan().all()


def test_minus_zero_counts_as_zero() -> None:
    """Else the bits of a median would say in which order the signs came."""
    for values in ([-0.0], [-0.0, 0.0], [-0.0, -0.0, 0.0, 5.0], [-5.0, -0.0, -0.0]):
        zeros = in_one_piece(torch.tensor(values))
        assert not zeros[zeros == 0].signbit().any()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.one_of(FLOATS, st.just(float("nan")))] * 3), max_size=40))
def test_columns_are_found_at_once_and_cells_without_a_value_do_not_count(rows: list[tuple[float, ...]]) -> None:
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
    found, counts = exact_quantiles(
        lambda: [part.unbind(1) for part in table.split(9)], 3, FRACTIONS, Collectives(World())
    )
    for column, quantiles, count in zip(table.unbind(1), found, counts, strict=True):
        present = column[~column.isnan()]
        assert count == len(present)
        assert torch.equal(quantiles.nan_to_num(nan=7e77), in_one_piece(present).nan_to_num(nan=7e77))
