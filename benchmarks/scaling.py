"""The fast mode's step on 1, 2 and 4 gloo ranks of one machine: predicted from its parts, and measured.

A step is its compute and then its collectives. A message of S bytes takes latency + S / bandwidth, and a ring passes
messages one after the other. docs/scaling.md has the formulas and the figures.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks import workload
from benchmarks.contestants import Ours
from benchmarks.ranks import on_ranks
from benchmarks.report import Report, measured, table, take_turns
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.session import Session
from dist_train.tasks.tabular import TabularTask

BATCH, NUM_ROWS = 4096, 65536
RANKS = (1, 2, 4)
SIZES = (24, 6144, 65536, 262144, 1048576)  # bytes of a message
REPEATS, TURNS = 50, 3


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between two ranks: seconds before the first byte, and bytes per second in one direction."""

    latency: float
    bandwidth: float

    def message(self, size: float) -> float:
        """Seconds of a message of `size` bytes."""
        return self.latency + size / self.bandwidth

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds in which a ring of `ranks` sums `size` bytes: each rank passes 2 (ranks - 1) parts."""
        return 2 * (ranks - 1) * self.message(size / ranks)

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until each of `ranks` has the `size` bytes of every other one: a ring."""
        return (ranks - 1) * self.message(size)


def fitted_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The link with the smallest sum of squared relative errors of its message times."""
    times = torch.tensor(seconds, dtype=torch.float64)
    design = torch.stack([torch.ones_like(times), torch.tensor(sizes, dtype=torch.float64)], 1)
    latency, per_byte = torch.linalg.lstsq(design / times[:, None], torch.ones_like(times)[:, None]).solution[:, 0]
    return Link(latency=max(float(latency), 1e-9), bandwidth=1 / max(float(per_byte), 1e-15))


def collectives_seconds(link: Link, ranks: int, parameters: int, width: int) -> float:
    """Seconds of the collectives of a step: gradients and loss are reduced, BatchNorm's statistics gathered.

    Bytes: float32 gradients; (count, mean, variance) of `width` channels in float64; two float32 sums of them; loss,
    weight and vote in float64.
    """
    reduced, gathered = (4 * parameters, 3 * 8), (3 * 8 * width, 2 * 4 * width)
    return sum(link.all_reduce(size, ranks) for size in reduced) + sum(link.all_gather(s, ranks) for s in gathered)


def compare(report: Report, rounds: int, seconds: float) -> None:
    """The section `scaling`. Predictions and measurements take turns: a machine that slows down slows down both."""
    messages: list[list[float]] = []
    alone: list[dict[str, list[float]]] = []
    steps: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    for _ in range(rounds):
        alone.append(on_ranks(1, _steps_alone, seconds))
        messages.append(on_ranks(2, _message_times))
        for ranks in RANKS:
            steps[ranks] += on_ranks(ranks, _step_times, seconds)
    link = fitted_link(SIZES, [measured(of)["median"] for of in zip(*messages, strict=True)])
    cores = len(os.sched_getaffinity(0))
    parameters = sum(p.numel() for p in workload.model().parameters())
    shown = table(
        f"gloo on {cores} cores, global batch {BATCH}, fast mode", "ranks", "compute ms", "collectives ms",
        "predicted ms", "measured ms", "spread", "error",
    )  # fmt: skip
    results = []
    for ranks in RANKS:
        sharing = max(1.0, ranks / cores)
        compute = sharing * measured([t for turn in alone for t in turn[str(BATCH // ranks)]])["median"]
        collectives = sharing * collectives_seconds(link, ranks, parameters, workload.HIDDEN)
        happened = measured(steps[ranks])
        error = (compute + collectives) / happened["median"] - 1
        results.append(
            {"ranks": ranks, "compute": compute, "collectives": collectives, "measured": happened, "error": error}
        )
        milliseconds = [f"{1e3 * s:.2f}" for s in (compute, collectives, compute + collectives, happened["median"])]
        shown.add_row(str(ranks), *milliseconds, f"±{happened['spread']:.2f}", f"{error:+.0%}")
    report.add("scaling", {"link": asdict(link), "gloo": results}, shown)


def _through_gloo(collectives: Collectives) -> Collectives:
    """Ranks that do not know that they share a host: gloo carries everything, and no shared memory."""
    return Collectives(World(rank=collectives.rank, size=collectives.size))


def _racer(collectives: Collectives, batch: int, seconds: float) -> partial[float]:
    config = workload.configuration(batch)
    task = TabularTask(config, workload.dataset(NUM_ROWS, torch.device("cpu")), collectives)
    session = Session(config, task, collectives)
    return partial(Ours(session, collectives).seconds_per_step, seconds)


def _steps_alone(collectives: Collectives, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step of one rank, by its rows."""
    racers = {str(BATCH // ranks): _racer(collectives, BATCH // ranks, seconds) for ranks in RANKS}
    take_turns(racers, 1)
    return take_turns(racers, TURNS)


def _step_times(collectives: Collectives, seconds: float) -> list[float]:
    racers = {"step": _racer(_through_gloo(collectives), BATCH, seconds)}
    take_turns(racers, 1)
    return take_turns(racers, TURNS)["step"]


def _message_times(collectives: Collectives) -> list[float]:
    """Seconds of a message of each size: an all-gather of two ranks is one message each way."""
    through_gloo = _through_gloo(collectives)
    return [measured([_gather(through_gloo, size) for _ in range(TURNS)])["median"] for size in SIZES]


def _gather(collectives: Collectives, size: int) -> float:
    tensor = torch.zeros(size, dtype=torch.uint8)
    collectives.all_gather(tensor)
    start = time.perf_counter()
    for _ in range(REPEATS):
        collectives.all_gather(tensor)
    return (time.perf_counter() - start) / REPEATS
