"""What `runtime.audit_every_steps` costs: the default job in the exact mode, V = 8.

Sessions without it and with N = 1 take turns in the same processes, and the checksums of each step are timed alone.
What N = 100 costs follows: the checksums, and a hundredth of the rest. Measured itself it would drown in noise.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from benchmarks.contestants import Ours
from benchmarks.exact_mode import EXACT, VIRTUAL_RANKS, session_of
from benchmarks.ranks import on_ranks
from benchmarks.report import Report, cell, measured, table, take_turns
from dist_train.distributed.collectives import Collectives
from dist_train.run.session import Session

EVERY = 100
CASES = ((1, 256), (1, 1024), (1, 4096), (2, 1024), (2, 4096))  # ranks, global batch size
_CHECKS = 300


def compare(report: Report, rounds: int, seconds: float) -> None:
    """The section `audit`."""
    shown = table(f"audit, V = {VIRTUAL_RANKS}", "ranks, global batch", "off ms/step", "N = 1 ms/step",
                  "checksums ms/step", f"cost at N = {EVERY}")  # fmt: skip
    results = []
    for world_size, batch_size in CASES:
        times = on_ranks(world_size, _measure, batch_size, rounds, seconds)
        off, audited = (measured([1e3 * t for t in times[mode]]) for mode in ("off", "audited"))
        checks = 1e3 * times["checks"]
        cost = (checks + (audited["median"] - off["median"] - checks) / EVERY) / off["median"]
        results.append({"ranks": world_size, "batch_size": batch_size, "off_ms": off, "audited_ms": audited,
                        "checksums_ms": checks, "cost": cost})  # fmt: skip
        shown.add_row(f"{world_size}, {batch_size}", cell(off, "{:.2f}"), cell(audited, "{:.2f}"), f"{checks:.3f}",
                      f"{100 * cost:.2f} %")  # fmt: skip
    report.add("audit", results, shown)


def _measure(collectives: Collectives, batch_size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds of a step with and without, the same number of turns on every rank, and of a step's checksums."""
    plain = session_of(collectives, batch_size, EXACT)
    audited = session_of(collectives, batch_size, EXACT, "runtime.audit_every_steps=1")
    racers = {
        name: partial(Ours(session, collectives).seconds_per_step, seconds)
        for name, session in (("off", plain), ("audited", audited))
    }
    return take_turns(racers, rounds) | {"checks": _seconds_of_checksums(audited)}


def _seconds_of_checksums(session: Session) -> float:
    """Seconds of what each step compares and takes down, the median."""
    assert session.audit is not None
    times = []
    for _ in range(_CHECKS):
        start = time.perf_counter()
        session.audit.changed()
        session.audit.note()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
