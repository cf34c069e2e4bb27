"""Steps of the default network on a GPU: its kernels, the loop around them, blocks of rows to choose among.

    python -m benchmarks.gpu_steps             # microseconds of a step, rows per second, twenty epochs of 2^20 rows
    python -m benchmarks.gpu_steps --loops     # the loop around the steps alone
    python -m benchmarks.gpu_steps --blocks    # each kernel of the largest batch with several blocks

float32 is TF32x3, as in training. Needs a GPU. Kernels are compiled first, which takes a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import contestants, workload
from dist_train.accel.gpu_network import Block, Buffers, GpuNetwork, Inbox, Loss, Optimum, Rows, Tiling, slices_on
from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.dropout import convert_dropout
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.run.session import Session, build_loop
from dist_train.tasks.tabular import TabularTask

STEPS_OF_A_GRAPH = 8
EPOCHS, MANY_ROWS = 20, 1 << 20
BLOCKS = {
    "first": [(64, 64, 4), (64, 64, 8), (128, 64, 8), (128, 32, 4), (64, 32, 4), (128, 128, 8)],
    "second": [(128, 32, 8), (32, 64, 8), (64, 32, 8), (64, 32, 4), (32, 32, 8)],
    "inputs": [(64, 64, 4), (64, 32, 4), (32, 64, 4), (128, 64, 8), (32, 128, 8)],
    "weights": [(32, 64, 4), (16, 64, 4), (16, 32, 4), (32, 32, 4), (64, 64, 8)],
    "last": [(64, 64, 4), (64, 128, 8), (32, 32, 4), (32, 128, 8), (32, 64, 4)],
}


class Kernels:
    """The kernels of a step on random rows, and an inbox of STEPS_OF_A_GRAPH steps."""

    def __init__(self, rows: int, slices: int = 1, precision: str = "tf32x3") -> None:
        device = torch.device("cuda")
        model = convert_dropout(workload.model(), ModelContext()).to(device)
        flat = FlatParameters(model.parameters())
        optimum = Optimum(
            flat.values, flat.zeros(2), torch.zeros((), device=device), flat.size, 0.01, (0.9, 0.999), 1e-8,
            workload.MAX_GRAD_NORM, lambda parameter: flat.offset_of(parameter),  # type: ignore[arg-type]
        )  # fmt: skip
        network = GpuNetwork(model.layers, optimum, Loss(None, 0.0), lambda tensor: tensor, precision)  # type: ignore[arg-type]
        network.read_weights()
        lengths = [rows * (i + 1) // slices - rows * i // slices for i in range(slices)]
        self.buffers = Buffers(network, slices_on(device, lengths, 1), rows, Tiling.of(rows, slices))
        features, targets = workload.rows_and_targets(workload.NUM_ROWS)
        padded = torch.nn.functional.pad(features, (0, -features.shape[1] % 4))
        self.rows = Rows(padded.to(device), targets.to(device, torch.uint8), None)
        self.inbox = Inbox(STEPS_OF_A_GRAPH, rows, device)
        self.inbox.numbers[:, : self.inbox.header] = 0
        self.inbox.numbers[:, self.inbox.header :] = torch.randint(0, len(targets), (STEPS_OF_A_GRAPH, rows))

    def steps(self) -> None:
        """Launch the steps of the inbox."""
        self.inbox.cursor.zero_()
        for _ in range(STEPS_OF_A_GRAPH):
            self.buffers.launch(self.rows, self.inbox.index, self.inbox)

    def of(self, name: str, block: Block) -> Callable[[], None]:
        """One kernel, with another block."""
        buffers, index = self.buffers, self.inbox.index
        tuning = buffers.tiling.tuning._replace(**{name: block})
        buffers.tiling = replace(buffers.tiling, tuning=tuning)
        launches: dict[str, Callable[[], None]] = {
            "first": lambda: buffers.first_linear(self.rows, index, self.inbox),
            "second": lambda: buffers.second_linear(self.rows, index),
            "inputs": lambda: buffers._backward(block, of_inputs=True, of_weights=False),
            "weights": lambda: buffers._backward(block, of_inputs=False, of_weights=True),
            "last": lambda: buffers.first_linear_backward(self.rows, index, buffers.sums, buffers.stats),
        }
        return launches[name]


def microseconds(act: Callable[[], None], times: int) -> float:
    """Of a call, recorded `times` after each other; the least of five."""
    cuda: Any = torch.cuda
    with cuda.stream(cuda.Stream()):
        act()
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=cuda.current_stream()):
            for _ in range(times):
                act()
        graph.replay()
        found = []
        for _ in range(5):
            first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            first.record()
            for _ in range(4):
                graph.replay()
            last.record()
            last.synchronize()
            found.append(1e3 * first.elapsed_time(last) / 4 / times)
    return min(found)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--loops", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        sys.exit(2)
    print(torch.cuda.get_device_name())
    if arguments.blocks:
        compare_blocks()
        return
    if not arguments.loops:
        measure_steps()
    measure_loops()


def compare_blocks() -> None:
    """Each kernel of the largest batch, its blocks from fast to slow."""
    kernels = Kernels(workload.BATCH_SIZES[-1])
    kernels.steps()
    for name, blocks in BLOCKS.items():
        found = sorted((microseconds(kernels.of(name, Block(*block)), 10), block) for block in blocks)
        print(f"{name}: " + ", ".join(f"{took:.1f} us {block}" for took, block in found), flush=True)


def measure_steps() -> None:
    """The kernels of a step at each batch size."""
    for rows in workload.BATCH_SIZES:
        modes = {"fast": (1, "tf32x3"), "exact, V = 8": (8, "tf32x3"), "bf16": (1, "bf16")}
        took = {name: microseconds(Kernels(rows, *mode).steps, 1) / STEPS_OF_A_GRAPH for name, mode in modes.items()}
        print(f"kernels, {rows} rows: " + ", ".join(f"{name} {us:.1f} us" for name, us in took.items()), flush=True)


def measure_loops() -> None:
    """Rows per second of the loop at each batch size, then the epochs."""
    device = torch.device("cuda", 0)
    collectives = Collectives(World(device=device))
    data = workload.dataset(workload.NUM_ROWS, device)
    for rows in workload.BATCH_SIZES:
        for more in ((), ("train.virtual_ranks=8",)):
            config = workload.configuration(rows, *more)
            ours = contestants.Ours(Session(config, TabularTask(config, data, collectives), collectives), collectives)
            ours(0.2)
            rates = sorted(ours(0.5) for _ in range(3))
            span = f"{rates[0]:,.0f} to {rates[2]:,.0f}"
            print(f"loop, {rows} rows {' '.join(more)}: {rates[1]:,.0f} rows/s ({span})", flush=True)
    for batch in (1024, 8192):
        run_epochs(batch, collectives)


def run_epochs(batch: int, collectives: Collectives) -> None:
    """Seconds of EPOCHS epochs over MANY_ROWS rows, without evaluations; kernels are compiled before."""
    config = workload.configuration(batch)
    task = TabularTask(config, workload.dataset(MANY_ROWS, collectives.device), collectives)
    session = Session(config, task, collectives)
    contestants.Ours(session, collectives)(0.2)
    wanted = session.progress.step + EPOCHS * session.feed.steps_per_epoch
    begun, start = session.progress.step, time.perf_counter()
    # A vote is seen some steps later: the time is scaled to the steps that were wanted.
    build_loop(
        config, session, collectives, save=lambda _step: None, track=lambda _record: None,
        wants_stop=lambda: session.progress.step + 1 >= wanted,
    ).run()  # fmt: skip
    torch.cuda.synchronize()
    took = (time.perf_counter() - start) / (session.progress.step - begun) * (wanted - begun)
    print(f"{EPOCHS} epochs of {MANY_ROWS:,} rows at a batch of {batch}: {took:.2f} s")


if __name__ == "__main__":
    main()
