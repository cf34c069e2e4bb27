"""What a run says it is going to do."""

from __future__ import annotations

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from tests.dist.sessions import BUILTIN, build


def test_the_exact_mode_names_its_virtual_ranks() -> None:
    plan = build(Collectives(World()), [*BUILTIN, "train.virtual_ranks=12"]).plan(World(size=4))
    assert next(plan.lines()).endswith("4 ranks on cpu, backend gloo, 12 virtual ranks")


def test_the_fast_mode_has_no_virtual_ranks() -> None:
    plan = build(Collectives(World()), BUILTIN).plan(World(size=2))
    assert next(plan.lines()).endswith("2 ranks on cpu, backend gloo")
