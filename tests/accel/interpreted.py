"""The kernels of a GPU's step in Triton's interpreter, and sessions whose steps they take."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from dist_train.config.load import load_config
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.base import GuardedStep
from dist_train.execution.fused import FusedSteps, fuse_steps
from dist_train.execution.recorder import Recorder
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task
from dist_train.training.step import EagerStep, StepResult

Change = Callable[[nn.Module], object]

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def _loaded() -> bool:
    """Load the kernels so that the interpreter runs them; false where Triton was loaded without it before.

    Triton looks at the environment where a kernel is defined, its own ones included; no later than here.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "triton" not in sys.modules and not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon  # which torch._dynamo loads, and which refuses a mixture
        from triton.runtime.interpreter import InterpretedFunction

        from dist_train.accel import gpu_layers, gpu_network

    del gpu_network, triton
    return isinstance(gpu_layers.first_linear, InterpretedFunction)


def _replace_once() -> None:
    """Have the interpreter replace the language's functions once for a kernel.

    Triton 3.6 does it again, around what it has replaced, whenever a kernel calls a function: a quarter of a step.
    """
    from triton import language
    from triton.runtime import interpreter

    plain, replaced = interpreter._patch_lang, set()

    def patch(function: Any) -> Any:
        modules = {m for m in (language, language.core) for value in function.__globals__.values() if value is m}
        if modules <= replaced:
            return interpreter._LangPatchScope()
        in_kernel = bool(replaced)
        replaced.update(modules)
        scope = plain(function)
        if not in_kernel:
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    if inspect.isclass(getattr(interpreter, "_LangPatchScope", None)):  # other versions do it in other ways
        interpreter._patch_lang = patch


INTERPRETED = _loaded()
if INTERPRETED:
    _replace_once()
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="Triton was loaded before, without its interpreter")


@dataclass
class Job:
    """A session, the computation in kernels where it has one, and what its steps gave."""

    session: Session
    eager: EagerStep
    fused: FusedSteps | None
    results: list[list[float]] = field(default_factory=list)
    """Of each step: loss, weight, votes, norm, finite."""

    def take(self, steps: int, stop_at: int = 3) -> Job:
        """Take so many steps from the session's position on."""
        self.results = list(self.one_by_one(steps, stop_at))
        return self

    def one_by_one(self, steps: int, stop_at: int = 3) -> Iterator[list[float]]:
        """The results of so many steps, each of which is taken when it is asked for."""
        return (_numbers(result) for result in self._results(steps, stop_at))

    def take_held(self, steps: int, stop_at: int = 3) -> Job:
        """Take so many steps all of which are sent off together."""
        assert self.fused is not None
        self.fused.hold(on=True)
        results = list(self._results(steps, stop_at))
        self.fused.settle(wait=True)
        self.fused.hold(on=False)
        self.results = [_numbers(result) for result in results]
        return self

    def _results(self, steps: int, stop_at: int) -> Iterator[StepResult]:
        feed = islice(self.session.feed.steps(self.session.progress.position), steps)
        for number, (batches, _) in enumerate(feed):
            yield self.session.step(batches, number, wants_stop=number == stop_at)

    def take_over(self, other: Job) -> None:
        """Stand where another job stands."""
        self.session.model.load_state_dict(other.session.model.state_dict())
        self.session.optimizer.load_state_dict(other.session.optimizer.state_dict())
        if self.session.average is not None and other.session.average is not None:
            self.session.average.load_state_dict(other.session.average.state_dict())

    @property
    def state(self) -> dict[str, Tensor]:
        """All that a step changes, by name."""
        state = {f"model {name}": value for name, value in self.session.model.state_dict().items()}
        state |= self.session.optimizer.state_dict()
        if self.session.average is not None:
            state |= {f"average {name}": value for name, value in self.session.average.state_dict().items()}
        return {name: value.clone() for name, value in state.items()}


def _numbers(result: StepResult) -> list[float]:
    return [*result.totals.tolist(), float(result.grad_norm), float(bool(result.finite))]


def make_job(
    arguments: list[str],
    recorder: Recorder | None,
    change: Change | None = None,
    collectives: Collectives | None = None,
) -> Job:
    """The session of a configuration, its model changed before it is prepared; kernels take the steps if recorded."""
    collectives = collectives or Collectives(World())
    config = load_config(arguments)
    task: Any = load_task(config, collectives)
    if change is not None:
        plain = task.model

        def changed(device: torch.device | None) -> nn.Module:
            model: nn.Module = plain(device)
            change(model)
            return model

        object.__setattr__(task, "model", changed)
    session = Session(config, task, collectives)
    assert isinstance(session.step, GuardedStep)
    eager = session.step.inner
    assert isinstance(eager, EagerStep)
    # Without the kernels of the CPU, of which nothing is to be compared here.
    eager.computation, session.execution.deferred = eager.compute, None
    fused = None
    if recorder is not None:
        fused = fuse_steps(eager, session.model, session.execution.context, recorder)
        if fused is not None:
            eager.computation, session.execution.deferred = fused.compute, fused
    return Job(session, eager, fused)


def write_numbers(path: Path, rows: int, features: int, classes: int = 3, *, cities: bool = False) -> list[str]:
    """A table of numbers, weights of rows, and text where asked for; the arguments that train on it."""
    rng = np.random.default_rng(11)
    others = 20
    count = rows + 2 * others
    x = rng.normal(size=(count, features))
    score = x[:, 0] + 0.5 * x[:, 1] + 0.3 * rng.normal(size=count)
    edges = np.quantile(score, np.arange(1, classes) / classes)
    columns: dict[str, Any] = {f"x{i}": x[:, i] for i in range(features)}
    if cities:
        columns["city"] = rng.choice(["Lund", "Oslo", "Bergen"], size=count)
    columns |= {
        "amount": rng.choice([0.0, 0.5, 1.0, 2.5], size=count),
        "risk": np.array([f"class {i}" for i in range(classes)])[np.digitize(score, edges)],
        "split": ["train"] * rows + ["valid"] * others + ["test"] * others,
    }
    pl.DataFrame(columns).write_parquet(path)
    return [
        f"data.path={path}", "data.target=risk", "data.split_column=split", "data.drop=[amount]", "train.epochs=100",
        "optim.lr=3e-3", "schedule.warmup_steps=10", "model.hidden_dim=16", "train.global_batch_size=24",
    ]  # fmt: skip
