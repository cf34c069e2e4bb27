"""What a run says it is going to do."""

from __future__ import annotations

import pytest

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from tests.dist.sessions import BUILTIN, build


@pytest.mark.parametrize(("world_size", "held"), [(1, 12), (2, 12 + 6), (4, 12 + 3)])
def test_the_exact_mode_counts_its_slices_gradients_in_the_memory(world_size: int, held: int) -> None:
    session = build(Collectives(World()), [*BUILTIN, "train.virtual_ranks=12"])
    plan = session.plan(World(size=world_size))
    weights = plan.parameters * 4
    assert plan.state_bytes == weights * 4 + weights * held
    assert next(plan.lines()).endswith("backend gloo, 12 virtual ranks")


def test_the_fast_mode_has_no_virtual_ranks() -> None:
    plan = build(Collectives(World()), BUILTIN).plan(World(size=2))
    assert plan.state_bytes == plan.parameters * 4 * 4
    assert next(plan.lines()).endswith("2 ranks on cpu, backend gloo")
