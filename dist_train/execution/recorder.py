"""Records the kernels of a step as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist


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
            # Torch's generator was made part of the capture, and would refuse to draw from now on.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
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


def record_or_warn(recorder: Recorder, launch: Callable[[], Any]) -> Recording | None:
    """What a function launches, recorded; None, with a warning, where CUDA does not record an operation in it."""
    try:
        return recorder.record(launch)
    except RuntimeError as error:
        reason = _why_not_captured(error)
        if reason is None:
            raise
        warnings.warn(f"the step cannot be recorded as a CUDA graph, going on without: {reason}", stacklevel=3)
        return None


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
