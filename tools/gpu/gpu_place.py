"""Where the parts of the probe run: a device, rows on it, sessions on these rows, and clocks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import workload
from dist_train.data.dataset import Dataset
from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution import exact, single
from dist_train.execution.recorded import GraphStep
from dist_train.execution.recorder import CudaRecorder
from dist_train.run.session import Session
from dist_train.tasks.tabular import TabularTask
from dist_train.training.step import EagerStep, Step, StepResult

Result = dict[str, Any]
"""What a part has found, JSON types: `held` and `said` of a check, or figures."""

# Steps after which a shape is recorded.
SETTLED = 16
# A rate that float32, in which a recorded step reads it, holds exactly; few steps, which the CPU does not compile.
COMPARED = (
    "optim.lr=0.0009765625", "schedule.warmup_steps=0", "schedule.min_lr_ratio=1", "train.max_steps=1000",
)  # fmt: skip


class StandIn:
    """In place of a CUDA graph on the CPU: runs what was recorded again, with whatever is in memory by then."""

    def use_stream(self) -> None:
        """The CPU has no streams."""

    def record(self, launch: Callable[[], Any]) -> StandInRecording:
        """Nothing is run."""
        return StandInRecording(launch)


class StandInRecording:
    """A function in place of kernels."""

    def __init__(self, launch: Callable[[], Any]) -> None:
        self.replay = launch

    def reset(self) -> None:
        """Nothing is held."""


@contextmanager
def _plain_modules() -> Iterator[None]:
    """Sessions of the CPU compute with the modules that a GPU has."""
    with patch.object(single, "accelerate", _as_it_is), patch.object(exact, "accelerate", _as_it_is):
        yield


def _as_it_is(model: nn.Module, *_: object) -> nn.Module:
    return model


class Place:
    """A device with the rows of the benchmarks on it. `short`: fewer repetitions, small batches."""

    def __init__(self, device: torch.device, *, short: bool = False) -> None:
        self.device = device
        self.short = short
        self.on_gpu = device.type == "cuda"
        self.data = workload.dataset(workload.NUM_ROWS, device)
        self.alone = Collectives(World(device=device))

    def session(
        self, batch: int, *more: str, data: Dataset | None = None, collectives: Collectives | None = None
    ) -> Session:
        """A session of the benchmarks' job, with torch's modules, recorded; on the CPU by a stand-in."""
        # A long run would be compiled on the CPU.
        config = workload.configuration(batch, *(() if self.on_gpu else ("train.max_steps=1000",)), *more)
        collectives = collectives or self.alone
        task = TabularTask(config, data or self.data, collectives)
        without_own_kernels = patch("dist_train.execution.fused.fuse_steps", return_value=None)
        with without_own_kernels if self.on_gpu else _plain_modules():
            session = Session(config, task, collectives)
        inner = inner_step(session)
        recordable = session.feed.rows.on_device and config.train.accumulation_steps == 1  # type: ignore[attr-defined]
        if not self.on_gpu and recordable and isinstance(inner, EagerStep):
            session.step.inner = GraphStep(inner, session.execution.context, StandIn())  # type: ignore[attr-defined]
        return session

    def wait(self) -> None:
        """Until the GPU has done what it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give back what earlier parts held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wall_us(self, act: Callable[[], object], times: int, rounds: int = 3) -> float:
        """Microseconds of a call, all work done: the median of some rounds."""
        seen = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            for _ in range(times):
                act()
            self.wait()
            seen.append(1e6 * (time.perf_counter() - start) / times)
        return statistics.median(seen)

    def host_us(self, act: Callable[[], object], times: int) -> float:
        """Microseconds until a call returns, whatever the GPU still has to do."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            act()
        took = 1e6 * (time.perf_counter() - start) / times
        self.wait()
        return took

    def gpu_us(self, act: Callable[[], object], times: int, rounds: int = 3) -> float:
        """Microseconds that the GPU takes for a call, between two events."""
        if not self.on_gpu:
            return self.wall_us(act, times, rounds)
        cuda: Any = torch.cuda
        seen: list[float] = []
        for _ in range(rounds):
            first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            self.wait()
            first.record()
            for _ in range(times):
                act()
            last.record()
            last.synchronize()
            seen.append(1e3 * first.elapsed_time(last) / times)
        return statistics.median(seen)

    def captured(self, act: Callable[[], object]) -> Callable[[], None]:
        """A graph of what `act` launches."""
        recorder = CudaRecorder() if self.on_gpu else StandIn()
        recorder.use_stream()
        for _ in range(3):
            act()
        return recorder.record(act).replay


def inner_step(session: Session) -> Step:
    """The step of a session without the guard around it."""
    step: Step = getattr(session.step, "inner", session.step)
    return step


def eager_step(session: Session) -> EagerStep:
    """The step that is recorded."""
    step = inner_step(session)
    eager = step._eager if isinstance(step, GraphStep) else step
    assert isinstance(eager, EagerStep)
    return eager


def replays(session: Session) -> list[Callable[[], None]]:
    """For each shape that was recorded, what launches its kernels once more."""
    step = inner_step(session)
    recorded = step._recorded.values() if isinstance(step, GraphStep) else ()
    return [one._recording.replay for one in recorded if one._recording is not None]


class Trainer:
    """Takes steps of a session one by one, from a position on, by its own step or by `step`."""

    def __init__(self, session: Session, step: Step | None = None, start: Position | None = None) -> None:
        self.count = 0
        self._step = step or session.step
        self._feed: Iterator[Any] = session.feed.steps(start or session.progress.position)

    def __call__(self) -> StepResult:
        batches, _ = next(self._feed)
        self.count += 1
        return self._step(batches, self.count, wants_stop=False)


def numbers(result: StepResult) -> list[float]:
    """Of a step: totals, gradient norm, whether they are finite."""
    return [*result.totals.tolist(), float(result.grad_norm), float(bool(result.finite))]


def weights(session: Session) -> dict[str, torch.Tensor]:
    """A copy of the weights that would be evaluated."""
    return {name: value.clone() for name, value in session.scored.state_dict().items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all bits are the same."""
    return all(torch.equal(value, other[name]) for name, value in one.items())


def check(held: bool, said: str, **more: Any) -> Result:
    """The result of a check."""
    return {"held": held, "said": said, **more}


def show(title: str, figures: dict[str, Any], names: Sequence[str] = ()) -> None:
    """A line of figures."""
    chosen = {name: figures[name] for name in names or figures if name in figures}
    cells = [
        f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in chosen.items()
    ]
    print(f"  {title}: " + ", ".join(cells), flush=True)
