"""Rows per second of all contestants at every batch size, beside the limit that the matrix products set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks import array_peers, contestants, limits, workload
from benchmarks.report import Report, cell, measured, table, take_turns
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.session import Session
from dist_train.tasks.tabular import TabularTask

OURS, LIMIT = "dist_train", "products alone"


def compare(report: Report, device: torch.device, batch_sizes: Sequence[int], rounds: int, seconds: float) -> None:
    """A section for the device: contestants taking turns at each batch size, one thread."""
    data = workload.dataset(workload.NUM_ROWS, device)
    shown: Table | None = None
    results: list[dict[str, Any]] = []
    for batch_size in batch_sizes:
        racers = _racers(report, device, batch_size, data, seconds)
        rates = {name: measured(values) for name, values in take_turns(racers, rounds).items()}
        result = _result(batch_size, rates)
        results.append(result)
        if shown is None:
            shown = table(
                f"rows per second, {device.type}, one process (± highest over lowest)", "batch", *rates,
                f"{OURS} against " + ", ".join(result["ratio"]), f"of {LIMIT}", f"{OURS} GFLOP/s",
            )  # fmt: skip
        first = results[0]  # whose contestants are the columns
        ratios = ", ".join(f"{result['ratio'][n]:.2f}" if n in result["ratio"] else "-" for n in first["ratio"])
        cells = [cell(rates[n], "{:,.0f}") if n in rates else "-" for n in first["rows_per_second"]]
        shares = f"{result['share_of_products']:.0%}", f"{result['flops_per_second'] / 1e9:.1f}"
        shown.add_row(f"{batch_size}", *cells, ratios, *shares)
        report.say(f"  batch {batch_size}: " + "  ".join(cells))
    assert shown is not None
    report.add(f"throughput_{device.type}", results, shown)


def measure_limits(report: Report, device: torch.device, rounds: int, seconds: float) -> None:
    """A section for the device's best, one thread."""
    racers = {
        "float32 operations/s": partial(limits.square_products(device), seconds),
        "bytes/s": partial(limits.triad(device), seconds),
    }
    found = {name: measured(values) for name, values in take_turns(racers, rounds).items()}
    shown = table(f"limits, {device.type}, one thread", "what", "median")
    products, traffic = found.values()
    shown.add_row(f"square product of {limits.SQUARE}", cell(_scaled(products, 1e9), "{:.1f} GFLOP/s"))
    shown.add_row("triad beyond the caches", cell(_scaled(traffic, 1e9), "{:.1f} GB/s"))
    report.add(f"limits_{device.type}", found, shown)


def _racers(
    report: Report, device: torch.device, batch_size: int, data: Any, seconds: float
) -> dict[str, Callable[[], float]]:
    """Contestants that have taken a turn: allocations, threads, first calls. A peer that cannot is left out."""
    features, targets = (t.cpu() for t in (data.splits["train"].inputs[0], data.splits["train"].targets))
    collectives = Collectives(World(device=device))
    config = workload.configuration(batch_size)
    session = Session(config, TabularTask(config, data, collectives), collectives)
    peers = {
        "tutorial": contestants.tutorial, "Lightning": contestants.lightning, "Accelerate": contestants.accelerate,
        "JAX": array_peers.jax_epoch,
    }  # fmt: skip
    if device.type == "cpu":  # the only one that it has
        peers["scikit-learn"] = array_peers.scikit_learn
    racers: dict[str, Callable[[], float]] = {}
    for name, make in peers.items():
        try:
            racer = partial(make(features, targets, batch_size, device), seconds)
            racer()
        except Exception as error:
            report.say(f"  {name} takes no part: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            racers[name] = racer
    racers[OURS] = partial(contestants.Ours(session, collectives), seconds)
    racers[LIMIT] = partial(limits.network_products(batch_size, device), seconds / 2)
    for name in (OURS, LIMIT):
        racers[name]()
    return racers


def _result(batch_size: int, rates: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ours, limit = rates[OURS]["median"], rates[LIMIT]["median"]
    return {
        "batch_size": batch_size,
        "rows_per_second": rates,
        "ratio": {n: ours / rate["median"] for n, rate in rates.items() if n not in (OURS, LIMIT)},
        "flops_per_row": workload.flops_per_row(),
        "flops_per_second": workload.flops_per_row() * ours,
        "share_of_products": ours / limit,
    }


def _scaled(result: dict[str, Any], unit: float) -> dict[str, Any]:
    return result | {"median": result["median"] / unit}
