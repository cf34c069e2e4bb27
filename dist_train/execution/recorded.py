"""A step as one CUDA graph: the host sends a few numbers and one launch, instead of some hundred kernels.

What a recorded step may touch: kernels read the batch's row indices, the first counters of the random streams, the
learning rate and the vote to stop from one tensor, which the host fills before each launch. Everything else that they
read or write (weights, moments, rows, gradients, results) stays where it was when they were recorded; `_Recorded` keeps
a reference to what nobody else keeps.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.execution.base import Execution, Inputs
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.training.protocols import Batch, DeferredSteps, GradientReducer
from dist_train.training.step import EagerStep, Number, Step, StepResult

# Steps of a shape that are taken eagerly before one is recorded: kernels are loaded, and DistributedDataParallel has
# laid out its buckets (11 are what torch's notes on CUDA graphs ask of it).
WARM_UP_STEPS = 11
# Shapes that are recorded: full batches, the last one of an epoch, and one of two rows more than that.
MAX_GRAPHS = 3

Shape = tuple[Any, ...]


class Recording(Protocol):
    """Kernels that were recorded."""

    def replay(self) -> None:
        """Launch them."""

    def reset(self) -> None:
        """Free what they hold. NCCL's communicator cannot be destroyed while a graph refers to it."""


class Recorder(Protocol):
    """Records the kernels that a function launches."""

    def use_stream(self) -> None:
        """Let all further work of this thread run on the stream that is recorded."""

    def record(self, launch: Callable[[], Any]) -> Recording:
        """Record what a function launches, without running it.

        Raises:
            RuntimeError: it cannot be recorded; all else is as it was before.
        """


class CudaRecorder:
    """torch.cuda.CUDAGraph, on the current stream; all graphs share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def use_stream(self) -> None:
        """Leave the default stream, which cannot be recorded.

        Autograd's nodes, and DistributedDataParallel's hooks among them, belong to the stream on which they were made:
        the model has to be prepared after this.
        """
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            own = torch.cuda.Stream()
            own.wait_stream(torch.cuda.default_stream())
            torch.cuda.set_stream(own)

    def record(self, launch: Callable[[], Any]) -> Recording:
        """A graph of what was launched."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            # Other threads (NCCL's watchdog, this package's own) may ask CUDA something meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                launch()
        except RuntimeError:
            torch.cuda.set_stream(stream)
            self._end_allocations()
            raise
        return graph

    def _end_allocations(self) -> None:
        """After a capture that has failed: torch.cuda.graph leaves the allocator believing that it goes on."""
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)
        except RuntimeError:
            return  # the capture has ended, and the graph gives its share of the pool back
        torch._C._cuda_releasePool(device, self._pool)


class RecordedExecution:
    """Another execution whose steps are recorded."""

    def __init__(self, inner: Execution, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder
        self._step: GraphStep | None = None
        self.name = f"{inner.name}, recorded"
        self.deferred: DeferredSteps | None = None

    @property
    def context(self) -> ModelContext:
        """That of the execution that is recorded."""
        return self._inner.context

    @property
    def settled(self) -> bool:
        """Whether the last step was a recorded one, or none will be."""
        return self._step is not None and self._step.settled

    def prepare(self, model: nn.Module, sample: Inputs, name: str) -> nn.Module:
        """Prepare the model on the stream that will be recorded."""
        self._recorder.use_stream()
        return self._inner.prepare(model, sample, name)

    def reduce(self, model: nn.Module, parameters: FlatParameters, sample: Inputs) -> tuple[nn.Module, GradientReducer]:
        """As the execution that is recorded does."""
        return self._inner.reduce(model, parameters, sample)

    def step(self, eager: EagerStep) -> Step:
        """The step, recorded once its shape is known."""
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
        try:
            self._recorded[shape] = _Recorded(self._eager, self._context, self._recorder, batch)
        except RuntimeError as error:
            reason = _why_not_captured(error)
            if reason is None:
                raise
            warnings.warn(f"the step cannot be recorded as a CUDA graph, going on without: {reason}", stacklevel=3)
            self.close()
            return None
        return self._recorded[shape]


def _why_not_captured(error: BaseException) -> str | None:
    """What an operation said that CUDA does not record; None: the error is of another kind.

    Such an operation makes the whole capture invalid, so that torch.cuda.graph may raise another error after its own.
    Memory that runs out and a communication that fails say nothing about the step.
    """
    errors: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in errors:
        errors.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(one, (torch.OutOfMemoryError, dist.DistError)) for one in errors):
        return None
    said = [str(one).strip().splitlines()[0] for one in errors if "captur" in str(one)]
    return said[-1] if said else None


class _Recorded:
    """A step that was recorded, and the memory that it reads from and leaves its results in."""

    def __init__(self, eager: EagerStep, context: ModelContext, recorder: Recorder, batch: Batch) -> None:
        self._eager = eager
        self._context = context
        self._streams = context.used_streams
        device = eager.collectives.device
        self._pinned = device.type == "cuda"
        # One tensor, so that it takes one copy: first counters, learning rate and vote as float64, row indices.
        self._inbox = torch.zeros(len(self._streams) + 2 + len(batch.index), dtype=torch.int64, device=device)
        counters, numbers, index = self._inbox.split([len(self._streams), 2, len(batch.index)])
        rate, vote = numbers.view(torch.float64).unbind()
        self._results: tuple[Tensor, Number, Tensor | bool] | None = None
        place = BatchContext(
            slices=batch.context.slices, counters=dict(zip(self._streams, counters.unbind(), strict=True))
        )

        def launch() -> None:
            self._results = eager.compute([batch.by_index(index, place)], rate.float(), vote)

        self._recording = recorder.record(launch)
        # The kernels read these by address; RowRandom may replace them by longer ones.
        self._kept = context.random.sequences

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
        self._recording.replay()
        assert self._results is not None
        return StepResult(*self._results, lr, batch.global_rows)

    def reset(self) -> None:
        """Free the graph."""
        self._recording.reset()
        self._results = None
