"""Measure everything: `make bench`. A part of it, for development: `python -m benchmarks --only throughput --batch 32`.

Writes benchmarks/results/bench.json when everything was measured, or `--output`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import audit, ensemble, exact_mode, scaling, texts, throughput, timings, two_ranks, workload
from benchmarks.report import RESULTS, Report

CPU = torch.device("cpu")


def main() -> None:
    """Parse, measure, report."""
    arguments = _arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the peers draw from the global generator
    report = Report()
    rounds, seconds, batches = arguments.rounds, arguments.seconds, arguments.batch or workload.BATCH_SIZES
    parts: dict[str, Callable[[], None]] = {
        "limits": lambda: throughput.measure_limits(report, CPU, rounds, seconds / 2),
        "throughput": lambda: throughput.compare(report, CPU, batches, rounds, seconds),
        "tabm": lambda: ensemble.compare(report, arguments.batch or ensemble.BATCH_SIZES, rounds, seconds),
        "two_ranks": lambda: two_ranks.compare(report, rounds, seconds),
        "exact_mode": lambda: exact_mode.compare(report, rounds, seconds / 2),
        "audit": lambda: audit.compare(report, rounds, seconds / 2),
        "texts": lambda: texts.compare(report, min(rounds, 3)),
        "timings": lambda: timings.measure(report, rounds),
        "dry_run": lambda: timings.compare_dry_run(report),
        "scaling": lambda: scaling.compare(report, min(rounds, 3), seconds / 5),
        "gpu": lambda: _gpu(report, batches, rounds, seconds),
    }
    unknown = [name for name in arguments.only if name not in parts]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: there is {', '.join(parts)}")
    for name in arguments.only or parts:
        start = time.perf_counter()
        parts[name]()
        report.say(f"{name}: {time.perf_counter() - start:.0f} s")
    whole = not arguments.only and not arguments.batch
    report.close(arguments.output or (RESULTS if whole else None))


def _gpu(report: Report, batches: Sequence[int], rounds: int, seconds: float) -> None:
    if not torch.cuda.is_available():
        report.skip("gpu", "torch sees no GPU here")
        return
    device = torch.device("cuda", 0)
    throughput.measure_limits(report, device, rounds, seconds / 2)
    throughput.compare(report, device, batches, rounds, seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], help="a part; may be given several times")
    parser.add_argument("--batch", action="append", type=int, default=[], help="a batch size of the comparison")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
