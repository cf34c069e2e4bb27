"""Compiled steps against the plain step, alone and several at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_train.accel.blas import AVAILABLE
from dist_train.accel.cpu_network import MAX_ROWS
from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import TrainingFault
from dist_train.execution import choose
from dist_train.run.session import ROWS_AHEAD, Session, build_loop
from dist_train.training.loop import Ending
from tests.dist.sessions import BUILTIN, build

BATCH = 32
LONG = [*BUILTIN, f"train.global_batch_size={BATCH}", "train.epochs=100", "optim.lr=1e-4", "schedule.warmup_steps=5"]
EPOCH_STEPS = 562  # of 17,979 rows; the last has 27

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this build of torch does not offer its matrix product")


def session(*more: str, compiled: bool = True, start: Position | None = None) -> Session:
    made = build(Collectives(World()), [*LONG, *more])
    assert made.execution.deferred is not None
    if not compiled:
        eager: Any = made.step.inner  # type: ignore[attr-defined]
        eager.computation = eager.compute
        made.execution.deferred = None
    made.progress.position = start or Position()
    return made


def one_by_one(made: Session, steps: int) -> list[list[float]]:
    """Totals, norm and whether they were finite of each step."""
    seen = []
    for batches, position in made.feed.steps(made.progress.position):
        result = made.step(batches, made.progress.step, wants_stop=False)
        made.progress.step, made.progress.position = made.progress.step + 1, position
        seen.append([*result.totals.tolist(), float(result.grad_norm), float(result.finite)])
        if len(seen) == steps:
            return seen
    raise AssertionError


def in_loop(made: Session, stop_at: int, **arguments: Any) -> list[dict[str, Any]]:
    """Lines of a loop that is asked to stop at a step."""
    lines: list[dict[str, Any]] = []

    def asked() -> bool:
        return made.progress.step + 1 >= stop_at

    def forget(_step: int) -> None:
        pass

    defaults: dict[str, Any] = {"save": forget, "track": lines.append, "wants_stop": asked}
    ending = build_loop(made.config, made, Collectives(World()), **(defaults | arguments)).run()
    assert ending is Ending.STOPPED
    return lines


def assert_same_weights(one: Session, other: Session) -> None:
    for name, value in other.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], value), name
    for name, value in other.optimizer.state_dict().items():
        assert torch.equal(one.optimizer.state_dict()[name], value), name


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("train.class_weights=balanced", "train.label_smoothing=0.1", "optim.max_grad_norm=null"),
        ("train.global_batch_size=256", "model.hidden_dim=50", "model.dropout=0", "optim.max_grad_norm=0.1"),
    ],
    ids=str,
)
def test_the_loss_curve_is_the_plain_steps(more: tuple[str, ...]) -> None:
    made, plain = session(*more), session(*more, compiled=False)
    found, expected = torch.tensor(one_by_one(made, 30)), torch.tensor(one_by_one(plain, 30))
    torch.testing.assert_close(found[:, :3], expected[:, :3], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[:, 3], expected[:, 3], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], value, rtol=1e-3, atol=3e-4)
    assert made.optimizer.steps_taken == plain.optimizer.steps_taken == 30


@pytest.mark.parametrize("first", [0, EPOCH_STEPS - 9], ids=["from the start", "over the end of an epoch"])
def test_bits_do_not_depend_on_which_steps_are_computed_together(first: int) -> None:
    more = ("evaluation.every_steps=1000000", "log.every_steps=11")
    start = Position(0, first * BATCH)
    together, alone = session(*more, start=start), session(*more, start=start)
    for stop_at in (3, 4, 17, 60):
        in_loop(together, stop_at)
    assert together.progress.step >= 60
    one_by_one(alone, together.progress.step)
    assert alone.progress.position == together.progress.position
    assert_same_weights(together, alone)


def test_lines_of_metrics_are_those_of_the_plain_steps() -> None:
    more = ("log.every_steps=7", "train.max_steps=2500")
    found, expected = in_loop(session(*more), 40), in_loop(session(*more, compiled=False), 40)
    for line, plain in zip(found[: len(expected)], expected, strict=False):
        assert line.keys() == plain.keys()
        assert line["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
        for key in ("step", "epoch", "samples", "split", "learning_rate"):
            assert line[key] == plain[key]
    assert len(expected) >= 5


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step() -> None:
    made, before = session("log.every_steps=1000"), session("log.every_steps=1000")
    row = int(made.feed.sampler.order(0)[20 * BATCH + 3])
    rows: Any = made.task.splits["train"]
    rows.inputs[0][row] = torch.inf
    with pytest.raises(TrainingFault, match=r"^step 21 \(epoch 1\): the loss is nan"):
        in_loop(made, 1000)
    one_by_one(before, 20)
    for name, value in before.model.named_parameters():
        assert torch.equal(made.model.get_parameter(name), value), name
    assert made.optimizer.steps_taken == 20


def test_a_vote_is_seen_some_steps_later() -> None:
    made = session("log.every_steps=1000000", "evaluation.every_steps=1000000")
    in_loop(made, 100)
    assert 100 <= made.progress.step <= 100 + ROWS_AHEAD // BATCH


def test_a_replay_finds_the_weights_of_each_step() -> None:
    made, alone = session("log.every_steps=1000000"), session("log.every_steps=1000000")
    seen: list[torch.Tensor] = []

    def asked() -> bool:
        seen.append(made.optimizer.parameters.values.clone())
        return len(seen) == 20

    in_loop(made, 0, wants_stop=asked, put_off=False)
    for weights in seen:
        assert torch.equal(weights, alone.optimizer.parameters.values)
        one_by_one(alone, 1)


@pytest.mark.parametrize(
    "more", [("train.accumulation_steps=2",), (f"train.global_batch_size={MAX_ROWS + 1}", "train.epochs=1000")], ids=str
)
def test_steps_that_are_not_compiled_are_the_plain_ones(more: tuple[str, ...]) -> None:
    made, plain = session(*more), session(*more, compiled=False)
    assert one_by_one(made, 5) == one_by_one(plain, 5)
    assert_same_weights(made, plain)


def test_a_moving_average_follows_each_step() -> None:
    made = session("train.ema_decay=0.5")
    in_loop(made, 10)
    other = session("train.ema_decay=0.5")
    for _ in range(made.progress.step):
        one_by_one(other, 1)
    assert made.average is not None
    assert other.average is not None
    for name, value in other.average.state_dict().items():
        assert torch.equal(made.average.state_dict()[name], value), name


@pytest.mark.parametrize(
    "more",
    [
        (f"train.max_steps={choose.COMPILED_FROM_STEPS - 1}",),
        ("train.virtual_ranks=4",),
        ("train.precision=bf16",),
        ("model.embedding_dim=2",),
        ("model.hidden_dim=2048",),
    ],
    ids=str,
)
def test_jobs_whose_steps_are_not_compiled(more: tuple[str, ...]) -> None:
    assert build(Collectives(World()), [*LONG, *more]).execution.deferred is None
