"""What the exact mode costs beside the fast mode: V = 8 on the built-in table, taking turns in the same processes.

The exact mode with the products of torch's library, whose bits depend on the processor, shows what defined ones cost.
"""

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
EXACT = f"train.virtual_ranks={VIRTUAL_RANKS}"
MODES = {"fast": (), "exact": (EXACT,), "library": (EXACT, "runtime.products=library")}
DEFAULT, TABM = (), ("model.name=tabm", "data.numeric_transform=quantile")
# Model, ranks, global batch size.
CASES = (
    (DEFAULT, 1, 256), (DEFAULT, 1, 1024), (DEFAULT, 1, 4096), (DEFAULT, 8, 4096), (TABM, 1, 256), (TABM, 1, 4096),
)  # fmt: skip


def compare(report: Report, rounds: int, seconds: float) -> None:
    """The section `exact_mode`."""
    columns = "model, ranks, global batch", "fast ms/step", "exact ms/step", "ratio", "library's products"
    shown = table(f"exact mode, V = {VIRTUAL_RANKS}", *columns)
    results = []
    for keys, world_size, batch_size in CASES:
        times = on_ranks(world_size, _measure, batch_size, keys, rounds, seconds)
        fast, exact, library = (measured([1e3 * t for t in times[mode]]) for mode in MODES)
        ratio, model = exact["median"] / fast["median"], "tabm" if keys else "default"
        case = {"model": model, "ranks": world_size, "batch_size": batch_size}
        results.append({**case, "fast_ms": fast, "exact_ms": exact, "library_ms": library, "ratio": ratio})
        of_fast, of_exact, of_library = (cell(one, "{:.1f}") for one in (fast, exact, library))
        shown.add_row(f"{model}, {world_size}, {batch_size}", of_fast, of_exact, f"{ratio:.2f}x", of_library)
    report.add("exact_mode", results, shown)


def _measure(
    collectives: Collectives, batch_size: int, model: tuple[str, ...], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of a step in each mode, the same number of turns on every rank."""
    racers = {
        mode: partial(Ours(session_of(collectives, batch_size, *model, *keys), collectives).seconds_per_step, seconds)
        for mode, keys in MODES.items()
    }
    return take_turns(racers, rounds)


def session_of(collectives: Collectives, batch_size: int, *keys: str) -> Session:
    """The default job at a batch size; it never evaluates and never saves."""
    config = load_config(
        [
            "configs/credit_risk.yaml", f"train.global_batch_size={batch_size}", *keys,
            f"train.epochs={TOTAL_STEPS}", f"evaluation.every_steps={NEVER}", f"checkpoint.every_steps={NEVER}",
        ]
    )  # fmt: skip
    return Session(config, load_task(config, collectives), collectives)
