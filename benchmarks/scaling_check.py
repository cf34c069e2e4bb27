"""The simulator beside what can be measured here, and what it says of clusters that are not here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import workload
from benchmarks.contestants import Ours
from benchmarks.ranks import on_ranks
from benchmarks.report import Report, measured, table, take_turns
from benchmarks.scaling import Cluster, Compute, Link, Messages, Prediction, fitted_link, messages, predict
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.session import Session
from dist_train.tasks.tabular import TabularTask

BATCH, VIRTUAL_RANKS = 4096, 8
NUM_ROWS = 65536
RANKS = (1, 2, 4, 8)
POINTS = (64, 512, 1024, 2048, 4096)  # rows of a step on one rank
SIZES = (24, 6144, 65536, 262144, 1048576)  # bytes of a message
REPEATS = 50
TURNS = 3  # within a process

# Not measured: an H100 node with NVLink 4 and one 400 Gbit/s InfiniBand port per GPU, from the vendors' figures (450
# and 50 GB/s in one direction) and the order of magnitude of latencies that users of NCCL report.
GPUS = Cluster(
    inner=Link(latency=1.5e-6, bandwidth=450e9), outer=Link(latency=5e-6, bandwidth=50e9), ranks_per_node=8, start=10e-6
)
# Not measured either: a CUDA graph of a step that takes 100 us and 100 million rows a second.
GPU_COMPUTE = Compute(points=((1, 100e-6), (65536, 755e-6)), exact_fixed=50e-6, per_slice=100e-6, fold_slice=0.2e-6)
GPU_BATCHES = (65536, 1048576)
GPU_ROWS_OF_A_RANK = 65536  # where the global batch grows with the ranks
GPU_RANKS = (1, 2, 8, 16, 64, 256, 1024)
GPU_VIRTUAL_RANKS = (None, 64, 1024)


def sent_in_a_step() -> Messages:
    """Of the network that is measured."""
    parameters = sum(p.numel() for p in workload.model().parameters())
    return messages(parameters, workload.HIDDEN)


def compare(report: Report, rounds: int, seconds: float) -> None:
    """The section `scaling`: 1, 2, 4 and 8 gloo ranks of this machine, predicted and measured."""
    found = _collect(rounds, seconds)
    costs = _compute_costs(found["alone"])
    times = [measured(of)["median"] for of in zip(*found["messages"], strict=True)]
    compute = Compute(**costs)
    link = fitted_link(SIZES, times)
    here = Cluster(
        inner=link,
        outer=link,
        ranks_per_node=max(RANKS),
        trees=False,
        own_batch_norm=False,
        cores=len(os.sched_getaffinity(0)),
    )
    sent = sent_in_a_step()
    shown = table(
        f"gloo on {here.cores} cores, global batch {BATCH}, V = {VIRTUAL_RANKS}", "ranks, mode", "compute ms",
        "collectives ms", "predicted ms", "measured ms", "spread", "error",
    )  # fmt: skip
    results = []
    for ranks in RANKS:
        for mode, virtual_ranks in (("fast", None), ("exact", VIRTUAL_RANKS)):
            said = predict(compute, here, sent, ranks=ranks, batch_size=BATCH, virtual_ranks=virtual_ranks)
            happened = measured([t for turn in found[f"{ranks} ranks"] for t in turn[mode]])
            error = said.seconds / happened["median"] - 1
            results.append(
                {"mode": mode, **asdict(said), "seconds": said.seconds, "measured": happened, "error": error}
            )
            shown.add_row(
                f"{ranks}, {mode}", *_milliseconds(said), f"{1e3 * happened['median']:.2f}",
                f"±{happened['spread']:.2f}", f"{error:+.0%}",
            )  # fmt: skip
    measured_here = {"link": asdict(link), "message_seconds": dict(zip(SIZES, times, strict=True)), "compute": costs}
    report.add("scaling", {"costs": measured_here, "gloo": results}, shown)


def show_paper(report: Report) -> None:
    """The section `scaling_on_paper`."""
    clusters = table(
        "on paper: H100 nodes with NVLink and InfiniBand; nothing here is measured", "global batch, ranks, mode",
        "compute ms", "collectives ms", "step ms", "efficiency",
    )  # fmt: skip
    paper = [
        {"batch_size": batch, "mode": mode, **asdict(said), "seconds": said.seconds} for batch, mode, said in on_paper()
    ]
    for batch, mode, said in on_paper():
        clusters.add_row(f"{batch}, {said.ranks}, {mode}", *_milliseconds(said), f"{said.efficiency:.0%}")
    report.add("scaling_on_paper", paper, clusters)


def on_paper() -> list[tuple[int, str, Prediction]]:
    """(global batch, mode, prediction) for the GPUs."""
    sent = sent_in_a_step()
    cases = [(batch, mode, ranks) for batch in GPU_BATCHES for mode, ranks in product(GPU_VIRTUAL_RANKS, GPU_RANKS)]
    cases += [(GPU_ROWS_OF_A_RANK * ranks, None, ranks) for ranks in GPU_RANKS]
    found = []
    for batch, virtual_ranks, ranks in cases:
        if virtual_ranks is None or virtual_ranks % ranks == 0:
            said = predict(GPU_COMPUTE, GPUS, sent, ranks=ranks, batch_size=batch, virtual_ranks=virtual_ranks)
            found.append((batch, f"exact, V = {virtual_ranks}" if virtual_ranks else "fast", said))
    return found


def _milliseconds(said: Prediction) -> list[str]:
    return [f"{1e3 * seconds:.2f}" for seconds in (said.compute, said.collectives, said.seconds)]


def _racer(collectives: Collectives, batch: int, virtual_ranks: int | None, seconds: float) -> Callable[[], float]:
    named = "null" if virtual_ranks is None else virtual_ranks
    config = workload.configuration(batch, f"train.virtual_ranks={named}")
    session = Session(
        config, TabularTask(config, workload.dataset(NUM_ROWS, torch.device("cpu")), collectives), collectives
    )
    return partial(Ours(session, collectives).seconds_per_step, seconds)


def _collect(rounds: int, seconds: float) -> dict[str, list[Any]]:
    """What is predicted from and what is predicted, in turns, so that a machine that slows down slows down both."""
    found: dict[str, list[Any]] = {}
    for _ in range(rounds):
        turn = {"alone": on_ranks(1, _times_alone, seconds), "messages": on_ranks(2, _message_times)}
        turn |= {f"{ranks} ranks": on_ranks(ranks, _step_times, seconds) for ranks in RANKS}
        for name, times in turn.items():
            found.setdefault(name, []).append(times)
    return found


def _as_between_hosts(collectives: Collectives) -> Collectives:
    """Ranks that do not know that they share a host: gloo carries all, as the model has it."""
    return Collectives(World(rank=collectives.rank, size=collectives.size))


def _times_alone(collectives: Collectives, seconds: float) -> dict[str, float]:
    """Seconds of steps of one rank, and of adding up the gradients of one slice."""
    racers = {f"fast {rows}": _racer(collectives, rows, None, seconds) for rows in POINTS}
    for slices in (1, VIRTUAL_RANKS):
        racers[f"exact {slices}"] = _racer(collectives, BATCH, slices, seconds)
    partials = torch.zeros((VIRTUAL_RANKS, sent_in_a_step().gradients // 4))

    def fold() -> float:
        start = time.perf_counter()
        for _ in range(REPEATS):
            collectives.ordered_sum(partials)
        return (time.perf_counter() - start) / REPEATS / VIRTUAL_RANKS

    racers["fold"] = fold
    take_turns(racers, 1)
    return {name: measured(values)["median"] for name, values in take_turns(racers, TURNS).items()}


def _compute_costs(turns: list[dict[str, float]]) -> dict[str, Any]:
    """The fields of Compute."""
    found = {name: measured([turn[name] for turn in turns])["median"] for name in turns[0]}
    one, all_slices = found["exact 1"], found[f"exact {VIRTUAL_RANKS}"]
    slope = max(0.0, (all_slices - one) / (VIRTUAL_RANKS - 1))
    return {
        "points": [[rows, found[f"fast {rows}"]] for rows in POINTS],
        "exact_fixed": max(0.0, one - slope - found[f"fast {BATCH}"]),
        "per_slice": max(0.0, slope - found["fold"]),
        "fold_slice": found["fold"],
    }


def _message_times(collectives: Collectives) -> list[float]:
    """Seconds of a message of each size: half a ring of two ranks is one message each way, an all_gather."""
    return [measured([_gather(collectives, size) for _ in range(TURNS)])["median"] for size in SIZES]


def _gather(collectives: Collectives, size: int) -> float:
    tensor, collectives = torch.zeros(size, dtype=torch.uint8), _as_between_hosts(collectives)
    collectives.all_gather(tensor)
    start = time.perf_counter()
    for _ in range(REPEATS):
        collectives.all_gather(tensor)
    return (time.perf_counter() - start) / REPEATS


def _step_times(collectives: Collectives, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step in both modes."""
    collectives = _as_between_hosts(collectives)
    racers = {"fast": _racer(collectives, BATCH, None, seconds)}
    racers["exact"] = _racer(collectives, BATCH, VIRTUAL_RANKS, seconds)
    take_turns(racers, 1)
    return take_turns(racers, TURNS)
