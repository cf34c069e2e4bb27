"""The step as a CUDA graph: what the eager step computes, to the bit. Skipped, with a reason, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.recorded import WARM_UP_STEPS, GraphStep
from dist_train.run.session import Session, build_loop
from dist_train.training.loop import Ending
from tests.dist.sessions import BUILTIN, build
from tests.gpu import graphs
from tests.gpu.graphs import all_tensors, assert_recorded_is_eager, assert_same, session_of, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda sees no GPU on this machine"),
]

EPOCH_STEPS = 71  # of 17,979 rows at a batch of 256; the last has 59


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("train.precision=bf16",),
        ("train.precision=float64", "optim.max_grad_norm=null"),
        ("train.class_weights=balanced", "train.label_smoothing=0.1", "model.embedding_dim=4", "train.ema_decay=0.9"),
        ("train.ema_decay=0.99", "train.ema_warmup=false"),
        ("train.virtual_ranks=1",),
        ("train.virtual_ranks=4", "train.ema_decay=0.9"),
        ("train.virtual_ranks=4", "train.precision=bf16", "model.embedding_dim=4"),
    ],
    ids=" ".join,
)
def test_a_recorded_step_is_the_eager_step_to_the_bit(more: tuple[str, ...]) -> None:
    numbers, shapes = assert_recorded_is_eager(*more)
    assert shapes == {256}
    assert [number for number, of in enumerate(numbers) if of[2] > 0] == [50], "the vote"


@pytest.mark.filterwarnings("error")
def test_large_batches_with_an_embedding() -> None:
    """Its backward pass takes another kernel above 3,072 indices."""
    _, shapes = assert_recorded_is_eager(
        "train.global_batch_size=8192", "model.embedding_dim=4", "train.epochs=20", steps=30
    )
    assert shapes == {8192}


@pytest.mark.filterwarnings("error")
def test_a_run_that_goes_on_at_the_ragged_end_of_an_epoch_has_its_full_steps_recorded() -> None:
    _, shapes = assert_recorded_is_eager(steps=30, start=Position(0, (EPOCH_STEPS - 1) * 256))
    assert shapes == {256}


@pytest.mark.filterwarnings("error")
def test_a_longer_last_batch_takes_nothing_from_the_recorded_step() -> None:
    """Of batches of 202 rows the 89th, the last of an epoch, has 203, for which more random bits are counted out."""

    def overwrite(session: Session, taken: int) -> None:
        if taken % 89 == 0:  # what was given back is given out again
            device = session.feed.rows.targets.device  # type: ignore[attr-defined]
            for size in (1 << 10, 1 << 14, 1 << 17, 1 << 20):
                torch.full((size,), -1, dtype=torch.int64, device=device)

    _, shapes = assert_recorded_is_eager("train.global_batch_size=202", steps=200, between=overwrite)
    assert shapes == {202}


def test_a_recorded_step_that_is_not_finite_changes_nothing_but_statistics() -> None:
    session, step = session_of("train.ema_decay=0.9")
    rows: Any = session.task.splits["train"]
    for number, (batches, _) in enumerate(session.feed.steps(session.progress.position)):
        if number == WARM_UP_STEPS + 2:
            assert step._recorded
            before = all_tensors(session)
            rows.inputs[0][batches[0].index[3]] = torch.nan
        outcome = step(batches, number, wants_stop=False)
        if number == WARM_UP_STEPS + 2:
            break
    assert not outcome.finite
    after = all_tensors(session)
    statistics = {name for name in before if (name.startswith("model.pth/") and "running" in name) or "batches" in name}
    statistics = {name for name in statistics if name.startswith("model.pth/")}
    assert len(statistics) == 3
    assert any(name.startswith("average.pth/") for name in before)
    assert_same({n: t for n, t in after.items() if n not in statistics},
                {n: t for n, t in before.items() if n not in statistics})  # fmt: skip
    step.close()


def test_a_step_that_cannot_be_recorded() -> None:
    """Training goes on, on the same stream, to the same numbers, and memory is given out as before."""
    session, step = session_of()
    objective: Any = step._eager.objective

    def reads(*arguments: Any) -> Any:
        loss, weight = objective(*arguments)
        if torch.cuda.is_current_stream_capturing():
            loss.sum().item()
        return loss, weight

    step._eager.objective = reads
    stream, feed = torch.cuda.current_stream(), session.feed.steps(session.progress.position)

    def take(number: int) -> list[float]:
        outcome = step(next(feed)[0], number, wants_stop=False)
        return [*outcome.totals.tolist(), float(outcome.grad_norm)]

    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph, going on without: .*captur"):
        seen = [take(number) for number in range(20)]
    assert torch.cuda.current_stream() == stream
    expected, _, _ = trained(recorded=False, steps=20)
    assert seen == [numbers[:4] for numbers in expected]
    torch.empty(1 << 28, dtype=torch.uint8, device=graphs.DEVICE).zero_().sum().item()


def run(session: Session, collectives: Collectives, saved: dict[int, Any]) -> list[dict[str, Any]]:
    """The loop to its end; what it tracked and what it saved at each step."""
    lines: list[dict[str, Any]] = []

    def save(step: int) -> None:
        parts: dict[str, Any] = {part: dict(of) for part, of in session.tensor_parts().items()}
        parts = {part: {name: t.clone() for name, t in of.items()} for part, of in parts.items()}
        saved[step] = parts | {"state.json": {"progress": dict(session.progress.state_dict())}}

    loop = build_loop(session.config, session, collectives, save=save, track=lines.append, wants_stop=lambda: False)
    assert loop.run() is Ending.FINISHED
    return lines


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("more", [("train.ema_decay=0.9",), ("train.virtual_ranks=4",)], ids=" ".join)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(more: tuple[str, ...]) -> None:
    """Its first steps are eager again; evaluations, lines and checkpoints lie between recorded steps."""
    intervals = ("train.max_steps=160", "train.epochs=9", "log.every_steps=10", "evaluation.every_steps=35")
    arguments = (*more, *intervals, "checkpoint.every_steps=60")
    collectives, saved = Collectives(World(device=graphs.DEVICE)), {}
    whole, step = session_of(*arguments)
    expected = run(whole, collectives, saved)
    assert step._recorded
    again, other = session_of(*arguments)
    again.restore(saved[60])
    found = run(again, collectives, {})
    assert other._recorded
    assert_same(all_tensors(again), all_tensors(whole))
    later = [line for line in expected if line["step"] > 60]
    timeless = [[{k: v for k, v in line.items() if k != "samples_per_second"} for line in of] for of in (found, later)]
    assert timeless[0] == timeless[1]
    step.close()
    other.close()


def test_steps_of_several_passes_are_not_recorded() -> None:
    session = build(Collectives(World(device=graphs.DEVICE)), [*BUILTIN, "train.accumulation_steps=2"])
    assert not isinstance(session.step.inner, GraphStep)  # type: ignore[attr-defined]
