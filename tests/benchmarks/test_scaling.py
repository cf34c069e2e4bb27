"""The simulator: its collectives against counts made by hand, its limits, and what must not depend on the world."""

from __future__ import annotations

import pytest

from benchmarks.scaling import Cluster, Compute, Link, Messages, fitted_link, predict

LINK = Link(latency=1e-3, bandwidth=1e6)
SLOW = Link(latency=10e-3, bandwidth=1e5)
FLAT = Cluster(inner=LINK, outer=LINK, ranks_per_node=8, trees=False, own_batch_norm=False)
SENT = Messages(gradients=4000, batch_norm_forward=600, batch_norm_backward=200, votes=24)
COMPUTE = Compute(points=((10, 1.0), (110, 2.0)), exact_fixed=0.5, per_slice=0.1, fold_slice=0.01)


def test_a_ring_sums_in_two_rounds_of_parts() -> None:
    # Each of 4 ranks sends 3 + 3 parts of 1000 bytes: 6 * (1 ms + 1 ms).
    assert FLAT.all_reduce(4000, 4) == pytest.approx(12e-3)


def test_a_ring_gathers_what_each_rank_has() -> None:
    assert FLAT.all_gather(4000, 4) == pytest.approx(3 * 5e-3)
    assert FLAT.all_gather(4000, 1) == FLAT.all_reduce(4000, 1) == 0


def test_a_tree_is_taken_where_latency_is_all() -> None:
    trees = Cluster(inner=LINK, outer=LINK, ranks_per_node=1024)
    assert trees.all_reduce(24, 1024) == pytest.approx(2 * 10 * 1e-3 + 2 * 24e-6)
    assert trees.all_reduce(1e9, 4) == pytest.approx(1500.006)  # 2 * 3/4 of the bytes: the ring


def test_between_nodes_goes_one_part_for_each_rank_of_a_node() -> None:
    nodes = Cluster(inner=LINK, outer=SLOW, ranks_per_node=4, trees=False)
    within, between = 6 * (1e-3 + 1e-3), 2 * (10e-3 + 500 / 1e5)
    assert nodes.all_reduce(4000, 8) == pytest.approx(within + between)
    assert nodes.all_gather(4000, 8) == pytest.approx(7 * (10e-3 + 0.04))
    assert nodes.all_gather(4000, 4) == pytest.approx(3 * 5e-3)


def test_ranks_that_share_cores_take_turns() -> None:
    shared = Cluster(inner=LINK, outer=LINK, ranks_per_node=8, trees=False, own_batch_norm=False, cores=2)
    assert [shared.sharing(ranks) for ranks in (1, 2, 4, 8, 16)] == [1, 1, 2, 4, 4]
    said = predict(COMPUTE, shared, SENT, ranks=8, batch_size=880, virtual_ranks=None)
    assert said.compute == pytest.approx(2.0 * 4)
    assert said.collectives == pytest.approx(4 * predict(
        COMPUTE, FLAT, SENT, ranks=8, batch_size=880, virtual_ranks=None).collectives)  # fmt: skip


def test_compute_runs_straight_between_what_was_measured() -> None:
    assert [COMPUTE.fast(rows) for rows in (1, 10, 60, 110, 220)] == pytest.approx([1, 1, 1.5, 2, 4])


def test_a_step_of_the_fast_mode() -> None:
    said = predict(COMPUTE, FLAT, SENT, ranks=2, batch_size=120, virtual_ranks=None)
    assert said.compute == pytest.approx(1.5)
    gradients, votes = 2 * (1e-3 + 2000e-6), 2 * (1e-3 + 12e-6)
    assert said.collectives == pytest.approx(gradients + votes + (1e-3 + 600e-6) + (1e-3 + 200e-6))
    assert said.efficiency == pytest.approx(COMPUTE.fast(120) / (2 * said.seconds))


def test_torchs_own_batch_norm_sums_in_its_backward_pass() -> None:
    own = Cluster(inner=LINK, outer=LINK, ranks_per_node=8, trees=False)
    gathers = predict(COMPUTE, FLAT, SENT, ranks=4, batch_size=120, virtual_ranks=None).collectives
    sums = predict(COMPUTE, own, SENT, ranks=4, batch_size=120, virtual_ranks=None).collectives
    assert sums - gathers == pytest.approx(6 * (1e-3 + 50e-6) - 3 * (1e-3 + 200e-6))
    exact = [predict(COMPUTE, c, SENT, ranks=4, batch_size=120, virtual_ranks=8) for c in (own, FLAT)]
    assert exact[0] == exact[1]


def test_a_step_of_the_exact_mode_gathers_every_slice() -> None:
    said = predict(COMPUTE, FLAT, SENT, ranks=2, batch_size=120, virtual_ranks=8)
    assert said.compute == pytest.approx(1.5 + 0.5 + 4 * 0.1 + 8 * 0.01)
    assert said.collectives == pytest.approx(4 * 1e-3 + 4 * (4000 + 600 + 200 + 24) / 1e6)


def test_one_rank_is_fully_efficient() -> None:
    for virtual_ranks in (None, 8):
        said = predict(COMPUTE, FLAT, SENT, ranks=1, batch_size=110, virtual_ranks=virtual_ranks)
        assert (said.efficiency, said.collectives) == (1, 0)


def test_the_exact_mode_needs_ranks_that_divide_it() -> None:
    with pytest.raises(ValueError, match="3 ranks do not divide V = 8"):
        predict(COMPUTE, FLAT, SENT, ranks=3, batch_size=120, virtual_ranks=8)


def test_a_link_is_found_again_in_its_message_times() -> None:
    sizes = [24, 1000, 50_000, 1_000_000]
    found = fitted_link(sizes, [LINK.message(size) for size in sizes])
    assert (found.latency, found.bandwidth) == pytest.approx((LINK.latency, LINK.bandwidth))
