"""TabM: rows per second of this project, the authors' packages in a plain loop, and its matrix products alone.

The same rows, model and batch, on the built-in table, one thread, taking turns in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import rtdl_num_embeddings
import tabm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import workload
from benchmarks.contestants import Ours, wait_for
from benchmarks.report import Report, cell, measured, table, take_turns
from dist_train.config.families import TabMConfig
from dist_train.config.load import load_config
from dist_train.data.sources import ResidentRows
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.models.numeric_embeddings import bin_edges
from dist_train.models.tabm import TabM
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task
from dist_train.tasks.tabular import TabularTask

BATCH_SIZES = (256, 4096)
KEYS = TabMConfig()
LEARNING_RATE = 3e-3
CPU = torch.device("cpu")
OURS, AUTHORS, LIMIT = "dist_train", "authors' loop", "products alone"


def compare(report: Report, batch_sizes: Sequence[int], rounds: int, seconds: float) -> None:
    """The section `tabm`."""
    collectives = Collectives(World())
    shown = table(
        "TabM, rows per second, CPU, one thread (± highest over lowest)",
        "batch", OURS, AUTHORS, LIMIT, f"{OURS} against {AUTHORS}", f"of {LIMIT}",
    )  # fmt: skip
    results = []
    for batch_size in batch_sizes:
        session = _session(collectives, batch_size)
        task = cast(TabularTask, session.task)
        width = TabM(task.spec, KEYS).features.width
        racers = {
            OURS: partial(Ours(session, collectives), seconds),
            AUTHORS: partial(_turn, _authors_step(task, batch_size), batch_size, seconds),
            LIMIT: partial(_turn, _products(width, task.spec.num_classes, batch_size), batch_size, seconds),
        }
        for racer in racers.values():
            racer()  # allocations, compiled functions, first calls
        rates = {name: measured(values) for name, values in take_turns(racers, rounds).items()}
        ratios = [
            [a / b for a, b in zip(rates[OURS]["values"], rates[name]["values"], strict=True)]
            for name in (AUTHORS, LIMIT)
        ]
        against, share = (measured(values) for values in ratios)
        results.append({"batch_size": batch_size, "rates": rates, "against_authors": against, "of_products": share})
        shown.add_row(
            f"{batch_size}", *(cell(rate, "{:,.0f}") for rate in rates.values()),
            cell(against, "{:.2f}"), cell(share, "{:.0%}"),
        )  # fmt: skip
    report.add("tabm", results, shown)


def _session(collectives: Collectives, batch_size: int) -> Session:
    config = load_config(
        [
            "configs/credit_risk.yaml", "model.name=tabm", "data.numeric_transform=quantile",
            f"optim.lr={LEARNING_RATE}", f"train.global_batch_size={batch_size}", f"train.epochs={workload.NEVER}",
            f"evaluation.every_steps={workload.NEVER}", f"checkpoint.every_steps={workload.NEVER}",
        ]
    )  # fmt: skip
    return Session(config, load_task(config, collectives), collectives)


def _turn(step: Callable[[], None], batch_size: int, seconds: float) -> float:
    """Rows per second of a while of steps."""
    for _ in range(2):
        step()
    wait_for(CPU)
    steps, start = 0, time.perf_counter()
    while steps < 4 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return batch_size * steps / (time.perf_counter() - start)


def _authors_step(task: TabularTask, batch_size: int) -> Callable[[], None]:
    """A step as the packages' documentation writes it: mean of members' losses, clipping, AdamW."""
    spec = task.spec
    embeddings = rtdl_num_embeddings.PiecewiseLinearEmbeddings(
        [bin_edges(column, KEYS.numeric_bins) for column in spec.numeric],
        KEYS.numeric_width, activation=False, version="B",
    )  # fmt: skip
    model: nn.Module = tabm.TabM.make(
        n_num_features=spec.num_numeric, cat_cardinalities=list(spec.category_sizes), d_out=spec.num_classes,
        num_embeddings=embeddings, k=KEYS.members, n_blocks=KEYS.blocks, d_block=KEYS.width, dropout=KEYS.dropout,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    rows = cast(ResidentRows, task.splits["train"])
    numeric, codes, targets = rows.inputs[0], rows.inputs[2].long(), rows.targets
    batches = _batches(len(targets), batch_size)

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        logits: Tensor = model(numeric[batch], codes[batch] if codes.shape[1] else None)
        F.cross_entropy(logits.flatten(0, 1), targets[batch].repeat_interleave(KEYS.members)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _batches(num_rows: int, batch_size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(num_rows)[: num_rows // batch_size * batch_size].split(batch_size)


def _products(width: int, num_classes: int, batch_size: int) -> Callable[[], None]:
    """The matrix products of a step alone, on memory that is there: each member's own, the widest that there are.

    The first layer's are one product for all members, later ones are batched over the members.
    """
    members, units = KEYS.members, KEYS.width
    wide = _three(batch_size, width, members * units)
    batched: list[Any] = []
    for outputs in [units] * (KEYS.blocks - 1) + [num_classes]:
        batched += _three(batch_size, units, outputs, members)

    def step() -> None:
        for a, b, out in wide:
            torch.mm(a, b, out=out)
        for a, b, out in batched:
            torch.bmm(a, b, out=out)

    return step


def _three(rows: int, inputs: int, outputs: int, *members: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Output, gradient of the weights, gradient of the inputs: what is multiplied, and where it goes."""
    x, w, dy = (torch.randn((*members, *shape)) for shape in ((rows, inputs), (inputs, outputs), (rows, outputs)))
    return [(x, w, torch.empty_like(dy)), (x.mT, dy, torch.empty_like(w)), (dy, w.mT, torch.empty_like(x))]
