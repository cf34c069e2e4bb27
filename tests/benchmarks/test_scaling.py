"""The formulas of the scaling benchmark against counts made by hand."""

from __future__ import annotations

import pytest

from benchmarks.scaling import Link, collectives_seconds, fitted_link

LINK = Link(latency=1e-3, bandwidth=1e6)


def test_a_ring_sums_in_two_rounds_of_parts() -> None:
    # Each of 4 ranks sends 3 + 3 parts of 1000 bytes: 6 * (1 ms + 1 ms).
    assert LINK.all_reduce(4000, 4) == pytest.approx(12e-3)


def test_a_ring_gathers_what_each_rank_has() -> None:
    assert LINK.all_gather(4000, 4) == pytest.approx(3 * 5e-3)


def test_one_rank_sends_nothing() -> None:
    assert collectives_seconds(LINK, 1, parameters=1000, width=25) == 0


def test_the_collectives_of_a_step() -> None:
    gradients, loss = 2 * (1e-3 + 2000e-6), 2 * (1e-3 + 12e-6)
    expected = gradients + loss + (1e-3 + 600e-6) + (1e-3 + 200e-6)
    assert collectives_seconds(LINK, 2, parameters=1000, width=25) == pytest.approx(expected)


def test_a_link_is_found_again_in_its_message_times() -> None:
    sizes = [24, 1000, 50_000, 1_000_000]
    found = fitted_link(sizes, [LINK.message(size) for size in sizes])
    assert (found.latency, found.bandwidth) == pytest.approx((LINK.latency, LINK.bandwidth))
