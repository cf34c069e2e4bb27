"""The recorded step against the plain one: with a recorder that calls functions again in place of a CUDA graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.base import GuardedStep
from dist_train.execution.recorded import MAX_GRAPHS, GraphStep
from dist_train.execution.recorder import CudaRecorder
from dist_train.run.session import Session
from dist_train.training.step import EagerStep
from tests.dist.sessions import BUILTIN, build

# A rate that float32, in which a graph reads it, holds exactly.
RATE = ["optim.lr=0.0009765625", "schedule.warmup_steps=0", "schedule.min_lr_ratio=1"]
EPOCH_STEPS = 71  # of the built-in table at a batch of 256; the last has 59 rows


class Repeated:
    """Runs what was recorded again, as a graph would run its kernels, with whatever is in memory by then."""

    def __init__(self, recorder: Repeater, launch: Callable[[], Any]) -> None:
        self._recorder = recorder
        self._launch = launch

    def replay(self) -> None:
        self._recorder.runs += 1
        self._launch()

    def reset(self) -> None:
        self._recorder.resets += 1


class Repeater:
    """Records functions."""

    def __init__(self, fails: Callable[[], None] = lambda: None) -> None:
        self.fails = fails
        self.recordings = self.runs = self.resets = 0

    def use_stream(self) -> None:
        pass

    def record(self, launch: Callable[[], Any]) -> Repeated:
        self.recordings += 1
        self.fails()
        return Repeated(self, launch)


def recorded_session(recorder: Repeater | None, *more: str) -> tuple[Session, GraphStep | None]:
    session = build(Collectives(World()), [*BUILTIN, *RATE, "train.epochs=9", *more])
    assert isinstance(session.step, GuardedStep)
    assert isinstance(session.step.inner, EagerStep)
    if recorder is None:
        return session, None
    step = GraphStep(session.step.inner, session.execution.context, recorder, warm_up_steps=3)
    session.step.inner = step
    return session, step


def trained(
    recorder: Repeater | None, *more: str, steps: int = 90, start: Position | None = None
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Weights and results of some steps of the default job."""
    session, _ = recorded_session(recorder, *more)
    seen = []
    for batches, _ in session.feed.steps(start or session.progress.position):
        result = session.step(batches, len(seen), wants_stop=len(seen) == 5)
        seen.append([*result.totals.tolist(), float(result.grad_norm), bool(result.finite), result.learning_rate])
        if len(seen) == steps:
            break
    average = session.average.state_dict() if session.average else {}
    return dict(session.model.state_dict()) | average, seen


def assert_same(recorder: Repeater, *more: str, **how: Any) -> None:
    weights, results = trained(recorder, *more, **how)
    expected_weights, expected = trained(None, *more, **how)
    assert results == expected
    for name, value in expected_weights.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("train.class_weights=balanced", "train.label_smoothing=0.1", "model.embedding_dim=4", "train.ema_decay=0.9"),
    ],
)
def test_a_recorded_step_is_the_plain_step(more: tuple[str, ...]) -> None:
    recorder = Repeater()
    assert_same(recorder, *more)
    assert (recorder.recordings, recorder.runs) == (1, 86)  # three warm-up steps, and one of 90 is ragged


def test_a_recorded_step_of_the_exact_mode_is_the_plain_step() -> None:
    recorder = Repeater()
    assert_same(recorder, "train.virtual_ranks=4", "train.ema_decay=0.9", steps=20)
    assert (recorder.recordings, recorder.runs) == (1, 17)


def test_the_shape_of_the_first_step_is_not_the_only_one_that_is_recorded() -> None:
    """A run that is resumed just before the ragged last step of an epoch meets that one first."""
    recorder = Repeater()
    assert_same(recorder, steps=20, start=Position(0, (EPOCH_STEPS - 1) * 256))
    assert (recorder.recordings, recorder.runs) == (1, 16)


def test_the_ragged_step_is_recorded_once_it_is_warm_and_no_more_shapes_than_the_limit() -> None:
    recorder = Repeater()
    assert_same(recorder, "train.global_batch_size=4495", steps=24)  # of 5 steps an epoch the last has 4,494 rows
    assert recorder.recordings == 2
    assert recorder.recordings <= MAX_GRAPHS


def test_what_a_recorded_step_reads_is_kept_when_a_longer_batch_comes() -> None:
    """17,979 rows in batches of 202: the last one of an epoch has 203, which needs a longer sequence of counters."""
    recorder = Repeater()
    # Under autocast the compiled network of the CPU steps aside, so that masks are drawn as on a GPU.
    session, step = recorded_session(recorder, "train.global_batch_size=202", "train.precision=bf16")
    assert step is not None
    sequences: list[weakref.ref[torch.Tensor]] = []
    lengths = set()
    for number, (batches, _) in enumerate(session.feed.steps(Position(0, 80 * 202))):
        lengths.add(batches[0].global_rows)
        session.step(batches, number, wants_stop=False)
        if number == 4:
            assert recorder.recordings == 1
            sequences = [weakref.ref(tensor) for tensor in session.execution.context.random.sequences]
        if number == 10:
            break
    assert lengths == {202, 203}
    gc.collect()
    now = {id(tensor) for tensor in session.execution.context.random.sequences}
    assert all(id(ref()) not in now for ref in sequences), "the longer batch has asked for a longer sequence"
    assert sequences
    assert all(ref() is not None for ref in sequences)


def test_graphs_are_freed_before_the_process_group_goes() -> None:
    recorder = Repeater()
    session, step = recorded_session(recorder)
    assert step is not None
    for number, (batches, _) in enumerate(session.feed.steps(session.progress.position)):
        if number == 6:
            step.close()
        session.step(batches, number, wants_stop=False)
        if number == 8:
            break
    assert (recorder.recordings, recorder.runs, recorder.resets) == (1, 3, 1)


def test_steps_of_several_passes_are_not_recorded() -> None:
    recorder = Repeater()
    trained(recorder, "train.accumulation_steps=2", steps=6)
    assert recorder.recordings == recorder.runs == 0


def refused() -> None:
    """As torch.cuda.graph does: the operation fails, and then the end of the capture that it has made invalid."""
    try:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand much more")
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nand more")


def test_where_recording_fails_training_goes_on() -> None:
    recorder = Repeater(refused)
    with pytest.warns(
        UserWarning, match="cannot be recorded as a CUDA graph, going on without: CUDA error: operation not"
    ):
        weights, results = trained(recorder, steps=20)
    expected_weights, expected = trained(None, steps=20)
    assert recorder.recordings == 1
    assert results == expected
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


def out_of_memory() -> None:
    """The capture is sound, or it is not."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def communication() -> None:
    raise dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited during capture")


def mistake() -> None:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize("fails", [out_of_memory, communication, mistake])
def test_what_is_no_matter_of_recording_is_raised(fails: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError) as error:
        trained(Repeater(fails), steps=20)
    with pytest.raises(RuntimeError) as expected:
        fails()
    assert str(error.value) == str(expected.value)


class FailingGraph:
    """torch.cuda.graph around operations that CUDA does not record: its end raises before it restores the stream."""

    def __init__(self, _graph: Any, **_options: Any) -> None:
        pass

    def __enter__(self) -> None:
        torch.cuda.set_stream("the recording's")  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


class StandInGenerator:
    """A generator of torch.cuda, of which a capture has taken the state."""

    state = "that of the capture"

    def clone_state(self) -> str:
        return "a copy"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


def test_a_failed_recording_leaves_the_stream_and_the_allocator_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.cuda replaced."""
    stream, ended = ["the run's"], []
    generator = StandInGenerator()
    for name, stand_in in {
        "synchronize": lambda: None,
        "CUDAGraph": object,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda: stream[-1],
        "set_stream": stream.append,
        "current_device": lambda: 3,
        "default_generators": {3: generator},
        "graph": FailingGraph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: ended.append(("end", *of)), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: ended.append(("release", *of)), raising=False)
    with pytest.raises(RuntimeError, match="previous error"):
        CudaRecorder().record(lambda: None)
    assert stream[-1] == "the run's"
    assert ended == [("end", 3, (0, 1)), ("release", 3, (0, 1))]
    assert generator.state == "a copy"
