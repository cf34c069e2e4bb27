"""The audit finds a wrong bit in the step in which it is computed, and names the rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from dist_train.distributed.collectives import Collectives
from tests.dist.sessions import build
from tests.execution.audit.flips import EVERY, after_backward, flip_bit, small_job, take_steps
from tests.ranks import on_ranks


def flipped_gradient(collectives: Collectives, arguments: list[str], liar: int) -> list[str | None]:
    """The ends of an honest run of some steps, and of one in which a gradient is wrong once."""
    session = build(collectives, arguments)
    honest = take_steps(session, 2 * EVERY)
    calls = []

    def flip(gradients: Tensor) -> None:
        calls.append(None)
        if collectives.rank == liar and len(calls) == EVERY:  # the first computation of the audited step
            flip_bit(gradients, 5, 3)

    with after_backward(flip):
        fault = take_steps(session, EVERY)
    return [honest, fault]


@pytest.mark.parametrize(("world", "liar"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_a_flipped_gradient_is_found_and_named(tmp_path: Path, world: int, liar: int) -> None:
    for honest, fault in on_ranks(world, flipped_gradient, small_job(tmp_path), liar):
        assert honest is None
        assert fault is not None
        assert fault.startswith(f"step {3 * EVERY}: rank {liar} (host ")
        assert "the gradient" in fault
