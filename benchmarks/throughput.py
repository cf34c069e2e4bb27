"""Rows per second of this project and of the loop that tutorials teach, side by side in one run: `make bench`.

Same data (the built-in set, encoded), same network, loss, clipping, AdamW and batch size; one process, one thread.
The two take turns; medians of several rounds, with the spread (highest over lowest) beside them, and their ratio.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from dist_train.config.load import load_config
from dist_train.data.dataset import Dataset, load_dataset
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.runtime.collectives import Collectives
from dist_train.runtime.machine import describe_machine
from dist_train.runtime.world import World
from dist_train.session import Session

BATCH_SIZES = (32, 256, 1024, 8192)
ROUNDS = 5
SECONDS = 2.0
RESULTS = Path(__file__).parent / "results" / "throughput.json"


def main() -> None:
    torch.set_num_threads(1)
    table = Table("batch", "tutorial loop rows/s", "spread", "dist_train rows/s", "spread", "ratio")
    results = []
    for batch_size in BATCH_SIZES:
        config = load_config(["configs/credit_risk.yaml", f"train.global_batch_size={batch_size}"])
        collectives = Collectives(World())
        dataset = load_dataset(config.data, collectives, seed=0, one_hot=True, dtype=torch.float32)
        session = Session(config, dataset, collectives)
        rates: dict[str, list[float]] = {"tutorial": [], "dist_train": []}
        for _ in range(ROUNDS):
            rates["tutorial"].append(rate(tutorial_loop(dataset, batch_size)))
            rates["dist_train"].append(rate(our_loop(session)))
        results.append(add_row(table, str(batch_size), rates, "{:,.0f}"))
    Console().print(table)
    keep(results, RESULTS)


def add_row(table: Table, label: str, values: dict[str, list[float]], number: str) -> dict[str, object]:
    """Median and spread of each contestant, and the ratio of the second median to the first."""
    medians = {name: statistics.median(of) for name, of in values.items()}
    spreads = {name: max(of) / min(of) for name, of in values.items()}
    first, second = medians.values()
    cells = [text for name in values for text in (number.format(medians[name]), f"{spreads[name]:.2f}")]
    table.add_row(label, *cells, f"{second / first:.2f}")
    return {"case": label, "median": medians, "spread": spreads, "ratio": second / first}


def keep(results: list[dict[str, object]], file: Path) -> None:
    """Write results beside what they depend on."""
    file.parent.mkdir(exist_ok=True)
    machine = describe_machine(torch.device("cpu"))
    file.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def rate(step: Callable[[], int]) -> float:
    """Rows per second of a step that returns its rows, after a warm-up."""
    for _ in range(3):
        step()
    rows, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        rows += step()
    return rows / (time.perf_counter() - start)


def tutorial_loop(dataset: Dataset, batch_size: int) -> Callable[[], int]:
    """DataLoader over a TensorDataset, default AdamW, a loss read with .item() at every step."""
    rows, encoder = dataset.splits["train"], dataset.encoder
    model = FinancialClassifier(encoder.input_dim, 256, len(encoder.class_names)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(rows.inputs[0], rows.targets), batch_size=batch_size, shuffle=True)
    batches = iter(loader)

    def step() -> int:
        nonlocal batches
        try:
            features, targets = next(batches)
        except StopIteration:
            batches = iter(loader)
            features, targets = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(features), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        return len(targets)

    return step


def our_loop(session: Session) -> Callable[[], int]:
    """What training/loop.py does at a step without a line of metrics."""
    steps = session.feed.steps(session.progress.position)

    def step() -> int:
        batches, _ = next(steps)
        outcome = session.step(batches, 0, wants_stop=False)
        assert outcome.finite.item()
        session.meter.add(outcome)
        return outcome.rows

    return step


if __name__ == "__main__":
    main()
