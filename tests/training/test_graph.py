"""The recorded step against the plain one: with a recorder that calls functions again in place of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.session import Session
from dist_train.training.graph import GraphStep
from dist_train.training.step import EagerStep
from tests.dist.sessions import BUILTIN, build


class Repeater:
    """Runs what was recorded again, as a graph would run its kernels, with whatever is in memory by then."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.recordings = self.warm_ups = self.runs = 0

    def warm_up(self, launch: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return launch()

    def record(self, launch: Callable[[], Any]) -> Callable[[], None]:
        self.recordings += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")

        def run() -> None:
            self.runs += 1
            launch()

        return run


def trained(recorder: Repeater | None, *more: str, steps: int = 90) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Weights and outcomes of some steps of the default job, which has 71 an epoch, the last of them ragged."""
    # A rate that float32, in which a graph reads it, holds exactly.
    rate = ["optim.lr=0.0009765625", "schedule.warmup_steps=0", "schedule.min_lr_ratio=1"]
    session: Session = build(Collectives(World()), [*BUILTIN, *rate, *more])
    if recorder:
        assert isinstance(session.step, EagerStep)
        session.step = GraphStep(session.step, session.random, recorder, warm_up_steps=3)
    seen = []
    for batches, _ in session.feed.steps(session.progress.position):
        outcome = session.step(batches, len(seen), wants_stop=len(seen) == 5)
        seen.append([*outcome.totals.tolist(), float(outcome.grad_norm), bool(outcome.finite), outcome.learning_rate])
        if len(seen) == steps:
            break
    return dict(session.model.state_dict()), seen


@pytest.mark.parametrize(
    "more", [(), ("train.class_weights=balanced", "train.label_smoothing=0.1", "model.embedding_dim=4")]
)
def test_a_recorded_step_is_the_plain_step(more: tuple[str, ...]) -> None:
    recorder = Repeater()
    weights, outcomes = trained(recorder, *more)
    expected_weights, expected = trained(None, *more)
    assert (recorder.warm_ups, recorder.recordings, recorder.runs) == (3, 1, 86)  # one of 90 is ragged
    assert outcomes == expected
    for name, value in expected_weights.items():
        assert torch.equal(weights[name], value), name


def test_steps_of_several_passes_are_not_recorded() -> None:
    recorder = Repeater()
    trained(recorder, "train.accumulation_steps=2", steps=6)
    assert recorder.recordings == recorder.runs == 0


def test_where_recording_fails_training_goes_on() -> None:
    recorder = Repeater(fails=True)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph, going on without: operation not perm"):
        weights, outcomes = trained(recorder, steps=20)
    expected_weights, expected = trained(None, steps=20)
    assert recorder.recordings == 1
    assert outcomes == expected
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())
