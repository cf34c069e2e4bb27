"""What the exact mode costs beside the fast mode: V = 8 on the default job, both taking turns in the same processes."""

from __future__ import annotations

from functools import partial

from benchmarks.contestants import Ours
from benchmarks.ranks import on_ranks
from benchmarks.report import Report, cell, measured, table, take_turns
from benchmarks.workload import NEVER, TOTAL_STEPS
from dist_train.config.load import load_config
from dist_train.distributed.collectives import Collectives
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task

VIRTUAL_RANKS = 8
CASES = ((1, 256), (1, 1024), (1, 4096), (8, 4096))  # ranks, global batch size


def compare(report: Report, rounds: int, seconds: float) -> None:
    """The section `exact_mode`."""
    shown = table(f"exact mode, V = {VIRTUAL_RANKS}", "ranks, global batch", "fast ms/step", "exact ms/step", "ratio")
    results = []
    for world_size, batch_size in CASES:
        times = on_ranks(world_size, _measure, batch_size, rounds, seconds)
        fast, exact = (measured([1e3 * t for t in times[mode]]) for mode in ("fast", "exact"))
        ratio = exact["median"] / fast["median"]
        results.append({"ranks": world_size, "batch_size": batch_size, "fast_ms": fast, "exact_ms": exact,
                        "ratio": ratio})  # fmt: skip
        shown.add_row(f"{world_size}, {batch_size}", cell(fast, "{:.1f}"), cell(exact, "{:.1f}"), f"{ratio:.2f}x")
    report.add("exact_mode", results, shown)


def _measure(collectives: Collectives, batch_size: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step in both modes, the same number of turns on every rank."""
    racers = {
        mode: partial(Ours(_session(collectives, batch_size, virtual_ranks), collectives).seconds_per_step, seconds)
        for mode, virtual_ranks in (("fast", "null"), ("exact", str(VIRTUAL_RANKS)))
    }
    return take_turns(racers, rounds)


def _session(collectives: Collectives, batch_size: int, virtual_ranks: str) -> Session:
    config = load_config(
        [
            "configs/credit_risk.yaml", f"train.global_batch_size={batch_size}", f"train.virtual_ranks={virtual_ranks}",
            f"train.epochs={TOTAL_STEPS}", f"evaluation.every_steps={NEVER}", f"checkpoint.every_steps={NEVER}",
        ]
    )  # fmt: skip
    return Session(config, load_task(config, collectives), collectives)
