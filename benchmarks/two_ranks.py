"""Two ranks on two cores against one rank, at the same global batch."""

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

GLOBAL_BATCH = 4096
ROUNDS = 3  # for each of the others': what else the machine does slows two ranks down on either core


def compare(report: Report, rounds: int, seconds: float) -> None:
    """The section `two_ranks`."""
    rates = on_ranks(2, _measure, ROUNDS * rounds, seconds)
    one, two = (measured(rates[name]) for name in ("one", "two"))
    ratio = two["median"] / one["median"]
    shown = table(f"two ranks, global batch {GLOBAL_BATCH}", "", "one rank rows/s", "two ranks rows/s", "ratio")
    shown.add_row("dist_train", cell(one, "{:,.0f}"), cell(two, "{:,.0f}"), f"{ratio:.2f}x")
    results = {"batch_size": GLOBAL_BATCH, "one_rank": one, "two_ranks": two, "ratio": ratio}
    report.add("two_ranks", results, shown)


def _measure(collectives: Collectives, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Rows per second of a world of one, in which rank 1 sleeps in a collective, and of both ranks."""
    config = workload.configuration(GLOBAL_BATCH)
    data = workload.dataset(workload.NUM_ROWS, torch.device("cpu"))
    lone = Collectives(World())
    both = Ours(Session(config, TabularTask(config, data, collectives), collectives), collectives)
    one = Ours(Session(config, TabularTask(config, data, lone), lone), lone)

    def alone() -> float:
        rate = one(seconds) if collectives.is_main else 0.0
        collectives.all_gather_object(lambda: None)
        return rate

    racers: dict[str, Callable[[], float]] = {"one": alone, "two": lambda: both(seconds)}
    take_turns(racers, 1)
    return take_turns(racers, rounds)
