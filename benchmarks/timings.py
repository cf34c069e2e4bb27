"""What else a user waits for: start-up, encoder fit, evaluation, prediction, checkpoints; and what a dry run says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks import workload
from benchmarks.report import Report, cell, measured, table, take_turns
from dist_train.accel.host_memory import use_host_memory
from dist_train.data.encoding.encoder import fit_spec
from dist_train.data.tables.table import ColumnKinds
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.export import checkpoint_parts
from dist_train.run.scoring.predictor import Predictor
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task

REPOSITORY = Path(__file__).parent.parent
QUIET = ("wandb.mode=disabled", "runtime.device=cpu", "run.resume=never")
DRY_RUNS = ((1, 256), (1, 65536), (2, 256), (2, 65536))  # ranks, global batch size


def measure(report: Report, rounds: int) -> None:
    """The section `timings`: one process, one thread."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = workload.write_table(folder / "table.parquet", workload.NUM_ROWS)
        config = workload.configuration(1024, *arguments, f"run.dir={folder}", "run.name=run", *QUIET)
        world, environ = World(), dict(os.environ)
        collectives = use_host_memory(Collectives(world))
        session = Session(config, load_task(config, collectives), collectives)
        checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        _train(["run.name=run", f"run.dir={folder}", *arguments, *QUIET, "train.max_steps=20"])
        predictor = Predictor(folder / "run", collectives)
        whole = pl.read_parquet(folder / "table.parquet")
        train_rows = whole.filter(pl.col("split") == "train")
        kinds = ColumnKinds(numeric=tuple(f"x{i}" for i in range(workload.NUM_FEATURES)), categorical=())

        def save() -> None:
            checkpoints.write(1, checkpoint_parts(config, session, {}, world, environ), None)

        def fit() -> None:
            names = workload.CLASS_NAMES
            fit_spec(
                lambda columns: [train_rows.select(columns)],
                kinds,
                names,
                collectives,
                max_categories=256,
                source="table",
            )

        save()
        num_rows = {"encoder fit": workload.NUM_ROWS, "evaluation": workload.NUM_ROWS // 4}
        num_rows["predict a file"] = whole.height
        racers: dict[str, Callable[[], float]] = {
            "to the end of step 1": _seconds_to_first_step,
            "encoder fit": _seconds(fit),
            "evaluation": _seconds(lambda: session.score("valid", collectives)),
            "predict a file": _seconds(lambda: predictor.predict(folder / "table.parquet")),
            "checkpoint save": _seconds(save),
            "checkpoint restore": _seconds(lambda: session.restore(checkpoints.read(1))),
        }
        take_turns(racers, 1)  # loads what they need
        found = {name: measured(values) for name, values in take_turns(racers, rounds).items()}
    shown = table("what else takes time, one process, one thread", "what", "seconds", "rows/s")
    for what, result in found.items():
        rows = num_rows.get(what)
        result |= {"unit": "s"} | ({"rows": rows} if rows else {})
        shown.add_row(what, cell(result, "{:.3f}"), f"{rows / result['median']:,.0f}" if rows else "")
    report.add("timings", found, shown)


def compare_dry_run(report: Report) -> None:
    """The section `dry_run`: what it says of memory and speed, and what then happens."""
    shown = table(
        f"dry run, {workload.NUM_ROWS:,} training rows of {workload.NUM_FEATURES} columns", "ranks, global batch",
        "peak MiB a rank: said", "happened", "ratio", "rows/s: said", "happened", "ratio",
    )  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = workload.write_table(folder / "table.parquet", workload.NUM_ROWS)
        for ranks, batch_size in DRY_RUNS:
            arguments = [*data, f"train.global_batch_size={batch_size}", "train.epochs=2", *QUIET]
            arguments += [f"run.dir={folder}", "run.name=run"]
            said = _train([*arguments, "--dry-run"], ranks)
            memory, rate = _number(r"peak +about ([\d,]+)", said) * 2**20, _number(r"speed +about ([\d,]+)", said)
            _train(arguments, ranks)
            summary = json.loads((folder / "run" / "summary.json").read_text())
            happened, real = summary["peak_memory_bytes"], summary["samples_per_second"]
            results.append(
                {
                    "ranks": ranks, "batch_size": batch_size,
                    "peak_memory_bytes": {"said": memory, "happened": happened},
                    "rows_per_second": {"said": rate, "happened": real},
                }
            )  # fmt: skip
            shown.add_row(
                f"{ranks}, {batch_size}", f"{memory / 2**20:,.0f}", f"{happened / 2**20:,.0f}",
                f"{memory / happened:.2f}", f"{rate:,.0f}", f"{real:,.0f}", f"{rate / real:.2f}",
            )  # fmt: skip
    report.add("dry_run", results, shown)


def _seconds(act: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        act()
        return time.perf_counter() - start

    return timed


def _command(arguments: list[str], ranks: int = 1) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*start, str(REPOSITORY / "launch" / "train.py"), *arguments]


def _train(arguments: list[str], ranks: int = 1) -> str:
    """Run the command to its end; what it said."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(_command(arguments, ranks), env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"launch/train.py ended with {done.returncode}: {done.stderr}")
    return done.stderr


def _seconds_to_first_step() -> float:
    """From the start of `python launch/train.py` on the default job to the line of its first step, without wandb."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["configs/credit_risk.yaml", f"run.dir={folder}", "log.every_steps=1", "train.max_steps=1", *QUIET]
        environ, start = os.environ | {"OMP_NUM_THREADS": "1"}, time.perf_counter()
        with subprocess.Popen(
            _command(arguments), env=environ, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "step 1/1" in line:
                    seconds = time.perf_counter() - start
                    break
            else:
                raise RuntimeError("launch/train.py ended before its first step")
            process.stderr.read()
    return seconds


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in: {text}")
    return float(found[1].replace(",", ""))
