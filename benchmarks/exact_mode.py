"""What the exact mode costs beside the fast mode, side by side in one run: `make bench`.

V = 8 on the default job: global batches of 256, 1024 and 4096 rows on one rank, 4096 on 8 gloo ranks of this machine.
Both modes take turns in the same processes, one thread each; medians of the rounds, with the spread beside them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from benchmarks.throughput import add_row, keep, our_loop
from dist_train.config.load import load_config
from dist_train.data.dataset import load_dataset
from dist_train.runtime.collectives import Collectives
from dist_train.runtime.world import World, process_group
from dist_train.session import Session

VIRTUAL_RANKS = 8
CASES = ((1, 256), (1, 1024), (1, 4096), (8, 4096))  # ranks, global batch size
ROUNDS = 9
STEPS = 10
RESULTS = Path(__file__).parent / "results" / "exact_mode.json"


def main() -> None:
    table = Table("ranks, batch", "fast ms/step", "spread", "exact ms/step", "spread", "ratio")
    results = []
    for world_size, batch_size in CASES:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(measure, (world_size, batch_size, folder), nprocs=world_size, start_method="spawn")
            times = json.loads((Path(folder) / "times.json").read_text())
        milliseconds = {name: [seconds * 1e3 for seconds in values] for name, values in times.items()}
        results.append(add_row(table, f"{world_size}, {batch_size}", milliseconds, "{:.1f}"))
    Console().print(table)
    keep(results, RESULTS)


def measure(rank: int, world_size: int, batch_size: int, folder: str) -> None:
    """Seconds of a step in both modes, measured on rank 0."""
    torch.set_num_threads(1)
    world = World(
        rank=rank, size=world_size, local_rank=rank, local_size=world_size, rendezvous=f"file://{folder}/store"
    )
    with process_group(world, 300):
        collectives = Collectives(world)
        steps = {
            "fast": build(collectives, batch_size, "null"),
            "exact": build(collectives, batch_size, str(VIRTUAL_RANKS)),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                step()
                collectives.barrier()
                start = time.perf_counter()
                for _ in range(STEPS):
                    step()
                collectives.barrier()
                times[name].append((time.perf_counter() - start) / STEPS)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))


def build(collectives: Collectives, batch_size: int, virtual_ranks: str) -> Callable[[], int]:
    """A step of the default job in one of the modes."""
    config = load_config(
        ["configs/credit_risk.yaml", f"train.global_batch_size={batch_size}", f"train.virtual_ranks={virtual_ranks}"]
    )
    dataset = load_dataset(config.data, collectives, seed=0, one_hot=True, dtype=torch.float32)
    return our_loop(Session(config, dataset, collectives))


if __name__ == "__main__":
    main()
