"""Steps of a session on the device under test, recorded or eager; on a CPU a stand-in records them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from dist_train.config.load import load_config
from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.recorded import GraphStep
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task
from tests.dist.sessions import BUILTIN
from tests.execution.test_recorded import RATE, Repeater

DEVICE = torch.device("cuda", 0)

Numbers = list[list[float]]
Weights = dict[str, torch.Tensor]


def session_of(*more: str, collectives: Collectives | None = None) -> tuple[Session, GraphStep]:
    """A session of the default job, with torch's modules instead of kernels of its own, and its recorded step."""
    of_a_stand_in = RATE if DEVICE.type == "cpu" else []
    config, alone = load_config([*BUILTIN, *of_a_stand_in, *more]), Collectives(World(device=DEVICE))
    with patch("dist_train.execution.fused.fuse_steps", return_value=None):
        session = Session(config, load_task(config, alone), collectives or alone)
    inner: Any = session.step.inner  # type: ignore[attr-defined]
    if DEVICE.type == "cpu":
        inner = session.step.inner = GraphStep(inner, session.execution.context, Repeater())  # type: ignore[attr-defined]
    assert isinstance(inner, GraphStep)
    return session, inner


def all_tensors(session: Session) -> Weights:
    """Copies of everything that a checkpoint holds in tensors."""
    return {f"{part}/{name}": t.clone() for part, of in session.tensor_parts().items() for name, t in of.items()}


def trained(
    *more: str,
    recorded: bool,
    steps: int = 90,
    start: Position | None = None,
    collectives: Collectives | None = None,
    between: Callable[[Session, int], None] = lambda _session, _taken: None,
) -> tuple[Numbers, Weights, set[int]]:
    """Numbers of each step, all tensors at the end, and the rows of all ranks in the shapes that were recorded.

    Step 51 is voted to be the last, which is only noted. `between` is called after each step with their number so far.
    """
    session, step = session_of(*more, collectives=collectives)
    taken = step if recorded else step._eager
    seen: Numbers = []
    for batches, _ in session.feed.steps(start or session.progress.position):
        outcome = taken(batches, len(seen), wants_stop=len(seen) == 50)
        seen.append([*outcome.totals.tolist(), float(outcome.grad_norm), bool(outcome.finite), outcome.learning_rate])
        between(session, len(seen))
        if len(seen) == steps:
            break
    shapes = {rows for _, rows in step._recorded}
    tensors = all_tensors(session)
    step.close()
    return seen, tensors, shapes


def assert_recorded_is_eager(*more: str, **how: Any) -> tuple[Numbers, set[int]]:
    """The same numbers and tensors to the bit; the numbers, and the rows of the shapes that were recorded."""
    ours, weights, shapes = trained(*more, recorded=True, **how)
    theirs, expected, _ = trained(*more, recorded=False, **how)
    assert ours == theirs
    assert_same(weights, expected)
    return ours, shapes


def assert_same(weights: Weights, expected: Weights) -> None:
    """All bits."""
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
