"""The step as a CUDA graph: what the eager step computes, to the bit. Skipped, with a reason, without a GPU."""

from __future__ import annotations

import pytest
import torch

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.recorded import GraphStep
from tests.dist.sessions import BUILTIN, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda sees no GPU on this machine"),
]


def trained(*more: str, recorded: bool, steps: int = 90) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Numbers of each step and weights after 90: 71 are an epoch, the last of them ragged."""
    session = build(Collectives(World(device=torch.device("cuda"))), [*BUILTIN, *more])
    step = session.step.inner  # type: ignore[attr-defined]
    assert isinstance(step, GraphStep)
    taken = step if recorded else step._eager
    seen = []
    for batches, _ in session.feed.steps(session.progress.position):
        outcome = taken(batches, len(seen), wants_stop=len(seen) == 50)
        seen.append([*outcome.totals.tolist(), float(outcome.grad_norm), bool(outcome.finite), outcome.learning_rate])
        if len(seen) == steps:
            break
    if recorded:
        assert step._recorded
    return seen, dict(session.scored.state_dict())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("train.precision=bf16",),
        ("train.class_weights=balanced", "train.label_smoothing=0.1", "model.embedding_dim=4", "train.ema_decay=0.9"),
        ("train.virtual_ranks=4",),
    ],
)
def test_a_recorded_step_is_the_eager_step_to_the_bit(more: tuple[str, ...]) -> None:
    ours, weights = trained(*more, recorded=True)
    theirs, expected = trained(*more, recorded=False)
    assert ours == theirs
    assert ours[50][2] == 1.0
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_steps_of_several_passes_are_not_recorded() -> None:
    session = build(Collectives(World(device=torch.device("cuda"))), [*BUILTIN, "train.accumulation_steps=2"])
    assert not isinstance(session.step.inner, GraphStep)
