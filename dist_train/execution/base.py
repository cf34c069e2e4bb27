"""The contract of an execution, and what all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.determinism.guard import GeneratorGuard
from dist_train.execution.flat_parameters import ParameterLayout
from dist_train.training.protocols import Batch, DeferredSteps, GradientReducer
from dist_train.training.step import EagerStep, Forward, Step, StepResult

Inputs = tuple[Tensor, ...]
"""Arguments of a model, each (rows, ...)."""

MAX_STEPS = 64
"""Steps for whose results a computation of several at once has memory."""


class Execution(Protocol):
    """How a step is computed on the ranks of a job.

    It is called in this order: `prepare`, `lay_out`, `reduce`, `step`; `close` before the process group goes.
    `place` is for a second model, which is evaluated.
    """

    name: str
    """For the plan."""
    deferred: DeferredSteps | None
    """The steps, where several can be computed together; known once there is a `step`."""
    builds_on: torch.device | None
    """Where a model is to be when it comes to `prepare` and `place`; None: on the device."""

    @property
    def context(self) -> ModelContext:
        """What the modules of the prepared model share."""

    @property
    def settled(self) -> bool:
        """Whether steps take as long as they will: nothing is left that is done once."""

    def prepare(self, model: nn.Module, sample: Inputs, name: str) -> nn.Module:
        """Make a plain model compute over the rows of all ranks: dropout, BatchNorm, slices; state_dict keys stay.

        `sample` are inputs of a few rows; `name` is what messages call the model.

        Raises:
            UserError: the model has a module that this execution cannot compute.
        """

    def place(self, model: nn.Module) -> nn.Module:
        """A plain model that is not trained by gradients, held as the trained one is; state_dict keys stay."""

    def lay_out(self, parameters: Iterable[nn.Parameter]) -> ParameterLayout:
        """Where the optimizer finds parameters of a model that was prepared or placed."""

    def reduce(
        self, model: nn.Module, parameters: ParameterLayout, sample: Inputs
    ) -> tuple[nn.Module, GradientReducer]:
        """The module to call in training, and what sums its gradients over ranks."""

    def step(self, eager: EagerStep) -> Step:
        """The step, or a faster one with the same signature."""

    def close(self) -> None:
        """Give back what the device holds for the step."""


def bind(model: nn.Module, shared: ModelContext) -> Forward:
    """A model that is told with its inputs where the batch stands."""

    def forward(inputs: Inputs, context: BatchContext) -> Tensor:
        with shared.bound(context):
            logits: Tensor = model(*inputs)
        return logits

    return forward


class GuardedStep:
    """A step in which no global random generator may move. The guard compares each `every`-th step, counted from 1."""

    def __init__(self, step: Step, guard: GeneratorGuard, every: int = 1) -> None:
        self.inner = step
        self._guard = guard
        self._every = every

    def __call__(self, batches: Sequence[Batch], step: int, *, wants_stop: bool) -> StepResult:
        """Take the step.

        Raises:
            UserError: it has drawn from a global generator.
        """
        if (step + 1) % self._every:
            return self.inner(batches, step, wants_stop=wants_stop)
        with self._guard.watching(step + 1):
            return self.inner(batches, step, wants_stop=wants_stop)
