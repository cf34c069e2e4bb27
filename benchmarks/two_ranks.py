"""Two cores: two ranks of a thread each, or one process of two threads, against one thread, at the same batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import workload
from benchmarks.contestants import Ours
from benchmarks.ranks import on_ranks
from benchmarks.report import Report, cell, measured, table, take_turns
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.session import Session
from dist_train.tasks.tabular import TabularTask

BATCH_SIZES = (32, 256, 4096)
ROUNDS = 3  # for each of the others': what else the machine does slows two ranks down on either core


def compare(report: Report, rounds: int, seconds: float) -> None:
    """The section `two_ranks`."""
    shown = table(
        "two cores, rows per second", "global batch", "one thread", "two threads", "ratio", "two ranks", "ratio"
    )
    results = []
    for batch_size in BATCH_SIZES:
        found = on_ranks(2, _measure, batch_size, ROUNDS * rounds if batch_size == BATCH_SIZES[-1] else rounds, seconds)
        one, threads, two = (measured(found[name]) for name in ("one", "threads", "two"))
        result = {"batch_size": batch_size, "one_rank": one, "two_threads": threads, "two_ranks": two}
        ratios = [other["median"] / one["median"] for other in (threads, two)]
        results.append(result | {"ratio_of_threads": ratios[0], "ratio": ratios[1]})
        cells = [cell(threads, "{:,.0f}"), f"{ratios[0]:.2f}x", cell(two, "{:,.0f}"), f"{ratios[1]:.2f}x"]
        shown.add_row(f"{batch_size}", cell(one, "{:,.0f}"), *cells)
    report.add("two_ranks", results, shown)


def _measure(collectives: Collectives, batch_size: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Rows per second of a world of one, in which rank 1 sleeps in a collective, and of both ranks."""
    config = workload.configuration(batch_size)
    data = workload.dataset(workload.NUM_ROWS, torch.device("cpu"))
    lone = Collectives(World())
    both = Ours(Session(config, TabularTask(config, data, collectives), collectives), collectives)
    one = Ours(Session(config, TabularTask(config, data, lone), lone), lone)

    def alone(threads: int) -> float:
        torch.set_num_threads(threads)
        rate = one(seconds) if collectives.is_main else 0.0
        torch.set_num_threads(1)
        collectives.all_gather_object(lambda: None)
        return rate

    racers: dict[str, Callable[[], float]] = {
        "one": lambda: alone(1), "threads": lambda: alone(2), "two": lambda: both(seconds)
    }  # fmt: skip
    take_turns(racers, 1)
    return take_turns(racers, rounds)
