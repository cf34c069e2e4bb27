"""The whole step as one CUDA graph: the host sends a few numbers and one launch, instead of some hundred kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_train.determinism.keyed_random import RowRandom
from dist_train.training.protocols import Batch
from dist_train.training.step import EagerStep, Number, StepResult

# Steps taken as they are, on the stream that will be recorded, before the first is recorded: kernels are loaded, and
# DistributedDataParallel has laid out its buckets (11 are what torch's notes on CUDA graphs ask of it).
WARM_UP_STEPS = 11


class Recorder(Protocol):
    """Records the kernels that a function launches, and launches them again."""

    def warm_up(self, launch: Callable[[], Any]) -> Any:
        """Call a function in the way in which one can be recorded later."""

    def record(self, launch: Callable[[], Any]) -> Callable[[], None]:
        """Record what a function launches, without running it; the result runs it."""


class CudaRecorder:
    """torch.cuda.CUDAGraph, on a stream of its own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def warm_up(self, launch: Callable[[], Any]) -> Any:
        """On the stream that recordings are made on."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = launch()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, launch: Callable[[], Any]) -> Callable[[], None]:
        """A graph of what was launched."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, the watch over the ranks) may ask CUDA something meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay


class GraphStep:
    """`EagerStep` in one launch: gather, forward, backward, reduction, clipping, AdamW.

    A step of a new shape (the ragged last batch of an epoch) or of several passes is taken by `eager`; so is each, with
    a warning, should recording fail. What differs from step to step is written to memory that the kernels read: the
    places of the rows, the starts of the random bits, the learning rate and the vote to stop.
    """

    def __init__(
        self, eager: EagerStep, random: RowRandom, recorder: Recorder, warm_up_steps: int = WARM_UP_STEPS
    ) -> None:
        self._eager = eager
        self._random = random
        self._recorder = recorder
        self._warm_up_steps = warm_up_steps
        self._seen = 0
        self._shape: tuple[Any, ...] | None = None
        self._recorded: _Recorded | None = None

    def __call__(self, batches: Sequence[Batch], step: int, *, wants_stop: bool) -> StepResult:
        """Train on the batches unless the loss or the gradient is not finite on some rank."""
        shape = (len(batches), batches[0].slices, batches[0].global_rows)
        if self._shape is None:
            self._shape = shape
        if shape != self._shape or len(batches) > 1:
            return self._eager(batches, step, wants_stop=wants_stop)
        if self._seen < self._warm_up_steps:
            self._seen += 1
            return self._recorder.warm_up(lambda: self._eager(batches, step, wants_stop=wants_stop))  # type: ignore[no-any-return]
        (batch,) = batches
        if self._recorded is None:
            try:
                self._recorded = _Recorded(self._eager, self._random, self._recorder, batch)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"the step cannot be recorded as a CUDA graph, going on without: {reason}", stacklevel=2)
                self._random.unbind_counters()
                self._shape = ()
                return self._eager(batches, step, wants_stop=wants_stop)
        return self._recorded.run(batch, step, wants_stop=wants_stop)


class _Recorded:
    """A step that was recorded, and the memory that it reads from and leaves its results in."""

    def __init__(self, eager: EagerStep, random: RowRandom, recorder: Recorder, batch: Batch) -> None:
        self._eager = eager
        self._random = random
        self._keys = random.used_streams()
        device = eager.collectives.device
        self._pinned = device.type == "cuda"
        # One tensor, so that it takes one copy: starts of random bits, learning rate and vote as float64, places.
        self._inbox = torch.zeros(len(self._keys) + 2 + len(batch.index), dtype=torch.int64, device=device)
        starts, numbers, index = self._inbox.split([len(self._keys), 2, len(batch.index)])
        rate, vote = numbers.view(torch.float64).unbind()
        self._results: tuple[Tensor, Number, Tensor | bool] | None = None

        def launch() -> None:
            random.bind_counters(self._keys, starts)
            try:
                self._results = eager.compute([batch.by_index(index)], rate.float(), vote)
            finally:
                random.unbind_counters()

        self._replay = recorder.record(launch)

    def run(self, batch: Batch, step: int, *, wants_stop: bool) -> StepResult:
        """Take a step on a batch of the same shape."""
        lr = self._eager.learning_rate(step)
        self._eager.begin(batch)
        numbers = torch.tensor([lr, float(wants_stop)], dtype=torch.float64).view(torch.int64)
        parts = [
            torch.tensor([self._random.counter_for(*key) for key in self._keys], dtype=torch.int64),
            numbers,
            batch.index,
        ]
        # Pinned memory is torch's to hand out again, and only once the copy is done.
        message = torch.empty(self._inbox.shape, dtype=torch.int64, pin_memory=self._pinned)
        self._inbox.copy_(torch.cat(parts, out=message), non_blocking=True)
        self._replay()
        assert self._results is not None
        return StepResult(*self._results, lr, batch.global_rows)
