"""What the machine can do at best: matrix products and memory traffic, measured in the same run as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks import workload
from benchmarks.contestants import wait_for
from dist_train.execution.recorder import CudaRecorder

SQUARE = 2048
TRIAD_NUMBERS = 16 * 2**20  # of each array: 64 MiB, beyond the caches


def network_products(batch_size: int, device: torch.device) -> Callable[[float], float]:
    """A turn of the matrix products of a training step alone, on tensors that are there: rows per second.

    Nothing that computes the network with these products in float32 is faster. On a GPU they are one CUDA graph: eight
    launches from Python take longer than the products of a small batch.
    """
    products = []
    for number, (inputs, outputs) in enumerate(workload.LAYERS):
        x, w, dy = (torch.randn(shape, device=device) for shape in
                    ((batch_size, inputs), (outputs, inputs), (batch_size, outputs)))  # fmt: skip
        products += [(x, w.T, torch.empty_like(dy)), (dy.T, x, torch.empty_like(w))]
        if number:
            products.append((dy, w, torch.empty_like(x)))

    def step() -> None:
        for a, b, out in products:
            torch.mm(a, b, out=out)

    launch = _recorded(step) if device.type == "cuda" else step
    return lambda seconds: batch_size * _per_second(launch, seconds, device)


def square_products(device: torch.device) -> Callable[[float], float]:
    """A turn of one large square product: float32 operations per second."""
    a, b, out = (torch.randn((SQUARE, SQUARE), device=device) for _ in range(3))
    return lambda seconds: 2 * SQUARE**3 * _per_second(lambda: torch.mm(a, b, out=out), seconds, device)


def triad(device: torch.device) -> Callable[[float], float]:
    """A turn of a = b + 3 c on arrays beyond the caches: bytes per second that the program reads and writes."""
    a, b, c = (torch.randn(TRIAD_NUMBERS, device=device) for _ in range(3))
    moved = 3 * 4 * TRIAD_NUMBERS
    return lambda seconds: moved * _per_second(lambda: torch.add(b, c, alpha=3.0, out=a), seconds, device)


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """One launch of all kernels of a step."""
    recorder = CudaRecorder()
    recorder.use_stream()
    step()
    graph = recorder.record(step)

    def launch(_memory: object = step) -> None:
        """`step` is kept: the graph's kernels write to its tensors, whose memory would be given to others."""
        graph.replay()

    return launch


def _per_second(act: Callable[[], object], seconds: float, device: torch.device) -> float:
    """How often `act` is done in a second, after one that does not count."""
    act()
    wait_for(device)
    count, chunk, start = 0, 1, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        for _ in range(chunk):
            act()
        wait_for(device)
        count += chunk
        chunk = max(1, min(2 * chunk, int(seconds / 10 * count / max(time.perf_counter() - start, 1e-9))))
    return count / passed
