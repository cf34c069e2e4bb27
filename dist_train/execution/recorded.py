"""A step as one CUDA graph: the host sends a few numbers and one launch, instead of some hundred kernels.

What a recorded step may touch: kernels read the batch's row indices, the first counters of the random streams, the
learning rate and the vote to stop from one tensor, which the host fills before each launch. Everything else that they
read or write (weights, moments, rows, gradients, results) stays where it was when they were recorded; `_Recorded` keeps
a reference to what nobody else keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.execution.base import Execution, Inputs
from dist_train.execution.flat_parameters import ParameterLayout
from dist_train.execution.recorder import Recorder, Recording, record_or_warn
from dist_train.training.protocols import Batch, DeferredSteps, GradientReducer
from dist_train.training.step import EagerStep, Number, Step, StepResult

if TYPE_CHECKING:
    from dist_train.execution.fused import FusedSteps

# Steps of a shape that are taken eagerly before one is recorded: kernels are loaded, and DistributedDataParallel has
# laid out its buckets (11 are what torch's notes on CUDA graphs ask of it).
WARM_UP_STEPS = 11
# Shapes that are recorded: full batches, the last one of an epoch, and one of two rows more than that.
MAX_GRAPHS = 3

Shape = tuple[Any, ...]


class GpuExecution:
    """Another execution on a GPU: its steps in kernels of their own, or recorded, or as they are.

    `recorder` None: nothing can be recorded.
    """

    def __init__(self, inner: Execution, recorder: Recorder | None, *, rows_on_device: bool) -> None:
        self._inner = inner
        self._recorder = recorder
        self._rows_on_device = rows_on_device
        self._model: nn.Module | None = None
        self._step: GraphStep | FusedSteps | None = None
        self.builds_on = inner.builds_on
        self.name = inner.name if recorder is None else f"{inner.name}, recorded"
        self.deferred: DeferredSteps | None = None

    @property
    def context(self) -> ModelContext:
        """That of the other execution."""
        return self._inner.context

    @property
    def settled(self) -> bool:
        """Whether the last step was a recorded one, or none will be."""
        return self._inner.settled if self._step is None else self._step.settled

    def prepare(self, model: nn.Module, sample: Inputs, name: str) -> nn.Module:
        """Prepare the model, on the stream that will be recorded."""
        if self._recorder is not None:
            self._recorder.use_stream()
        return self._inner.prepare(model, sample, name)

    def place(self, model: nn.Module) -> nn.Module:
        """As the other execution does."""
        return self._inner.place(model)

    def lay_out(self, parameters: Iterable[nn.Parameter]) -> ParameterLayout:
        """As the other execution does."""
        return self._inner.lay_out(parameters)

    def reduce(
        self, model: nn.Module, parameters: ParameterLayout, sample: Inputs
    ) -> tuple[nn.Module, GradientReducer]:
        """As the other execution does."""
        self._model = model
        return self._inner.reduce(model, parameters, sample)

    def step(self, eager: EagerStep) -> Step:
        """The step, in kernels of its own where they know the model, else recorded once its shape is known."""
        if self._model is not None and next(self._model.parameters()).is_cuda:
            from dist_train.execution.fused import fuse_steps  # imports what only a step of its own needs

            fused = fuse_steps(eager, self._model, self.context, self._recorder)
            if fused is not None:
                eager.computation, self.deferred, self._step = fused.compute, fused, fused
                return eager
        if self._recorder is None or not self._rows_on_device:
            return self._inner.step(eager)
        self._step = GraphStep(eager, self.context, self._recorder)
        return self._step

    def close(self) -> None:
        """Free the graphs: before the process group goes."""
        if self._step is not None:
            self._step.close()


class GraphStep:
    """`EagerStep` in one launch: gather, forward, backward, reduction, clipping, AdamW.

    Each shape (rows of the slices, rows of all ranks) is recorded after it was taken eagerly `warm_up_steps` times, up
    to MAX_GRAPHS shapes. Other shapes and steps of several micro-batches stay eager; so does, with a warning, every
    step once CUDA has refused to record one.
    """

    def __init__(
        self, eager: EagerStep, context: ModelContext, recorder: Recorder, warm_up_steps: int = WARM_UP_STEPS
    ) -> None:
        self._eager = eager
        self._context = context
        self._recorder = recorder
        self._warm_up_steps = warm_up_steps
        self._seen: Counter[Shape] = Counter()
        self._recorded: dict[Shape, _Recorded] = {}
        self._gave_up = False
        self._replayed = False
        """The last step was recorded."""

    @property
    def settled(self) -> bool:
        """Whether the last step was a recorded one, or none will be."""
        return self._replayed or self._gave_up

    def __call__(self, batches: Sequence[Batch], step: int, *, wants_stop: bool) -> StepResult:
        """Train on the batches unless the loss or the gradient is not finite on some rank."""
        recorded = None
        if len(batches) == 1 and not self._gave_up:
            shape = (batches[0].context.slices, batches[0].global_rows)
            recorded = self._recorded.get(shape)
            if recorded is None and self._seen[shape] >= self._warm_up_steps and len(self._recorded) < MAX_GRAPHS:
                recorded = self._record(shape, batches[0])
            self._seen[shape] += 1
        self._replayed = recorded is not None
        if recorded is None:
            return self._eager(batches, step, wants_stop=wants_stop)
        return recorded.run(batches[0], step, wants_stop=wants_stop)

    def close(self) -> None:
        """Free the graphs; later steps are eager."""
        self._gave_up = True
        for recorded in self._recorded.values():
            recorded.reset()
        self._recorded.clear()

    def _record(self, shape: Shape, batch: Batch) -> _Recorded | None:
        recorded = _Recorded(self._eager, self._context, batch)
        if not recorded.record(self._recorder):
            self.close()
            return None
        self._recorded[shape] = recorded
        return recorded


class _Recorded:
    """A step that was recorded, and the memory that it reads from and leaves its results in."""

    def __init__(self, eager: EagerStep, context: ModelContext, batch: Batch) -> None:
        self._eager = eager
        self._context = context
        self._batch = batch
        self._streams = context.used_streams
        device = eager.collectives.device
        self._pinned = device.type == "cuda"
        # One tensor, so that it takes one copy: first counters, learning rate and vote as float64, row indices.
        self._inbox = torch.zeros(len(self._streams) + 2 + len(batch.index), dtype=torch.int64, device=device)
        self._results: tuple[Tensor, Number, Tensor | bool] | None = None
        self._recording: Recording | None = None
        self._kept: list[Tensor] = []
        """The kernels read these by address; RowRandom may replace them by longer ones."""

    def record(self, recorder: Recorder) -> bool:
        """Record the step; false, with a warning, where CUDA refuses."""
        batch = self._batch
        counters, numbers, index = self._inbox.split([len(self._streams), 2, len(batch.index)])
        rate, vote = numbers.view(torch.float64).unbind()
        place = BatchContext(
            slices=batch.context.slices, counters=dict(zip(self._streams, counters.unbind(), strict=True))
        )

        def launch() -> None:
            self._results = self._eager.compute([batch.by_index(index, place)], rate.float(), vote)

        self._recording = record_or_warn(recorder, launch)
        self._kept = self._context.random.sequences
        return self._recording is not None

    def run(self, batch: Batch, step: int, *, wants_stop: bool) -> StepResult:
        """Take a step on a batch of the same shape."""
        lr = self._eager.learning_rate(step)
        with self._context.bound(batch.context):
            counters = [self._context.counter_for(*stream) for stream in self._streams]
        parts = [
            torch.tensor(counters, dtype=torch.int64),
            torch.tensor([lr, float(wants_stop)], dtype=torch.float64).view(torch.int64),
            batch.index,
        ]
        # torch's pinned memory allocator hands it out again only once the copy is done.
        message = torch.empty(self._inbox.shape, dtype=torch.int64, pin_memory=self._pinned)
        self._inbox.copy_(torch.cat(parts, out=message), non_blocking=True)
        assert self._recording is not None
        self._recording.replay()
        assert self._results is not None
        return StepResult(*self._results, lr, batch.global_rows)

    def reset(self) -> None:
        """Free the graph."""
        if self._recording is not None:
            self._recording.reset()
        self._results = None
