"""A table of 4 GB prepared and trained for an epoch: memory beside the page cache, and rows per second beside memory.

python -m benchmarks.large_table FOLDER [ROWS]

FOLDER takes the table (4 GB), and three times that while the store is made. Memory is RssAnon of /proc/PID/status,
the largest of all samples (20 a second) over all processes of a command. The store is compared with the same rows held
in memory, by turns in one process, on data that the page cache holds. Figures go to
benchmarks/results/large_table.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.table_files import write_table
from dist_train.config.load import load_config
from dist_train.data.sources import Feed, ResidentRows
from dist_train.data.stores.store import Store
from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.session import Session
from dist_train.system.machine import describe_machine
from dist_train.tasks.registry import load_task

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).with_name("results") / "large_table.json"
KEYS = ["data.target=tier", "data.validation_fraction=0.05", "data.test_fraction=0.05", "runtime.device=cpu"]
SAMPLE_SECONDS = 0.05
TURNS = 7
ROWS_OF_A_TURN = 1 << 18


def measured(*arguments: object) -> dict[str, float]:
    """Run a command; seconds, processor seconds, and the largest RssAnon of any of its processes in MiB."""
    began = time.monotonic()
    before = _children_seconds()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=REPOSITORY)
    peak = 0.0
    while process.poll() is None:
        peak = max([peak, *(_anonymous_mebibytes(p) for p in _family(process.pid))])
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"{arguments} ended with {process.returncode}")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(_children_seconds() - before, 1),
        "peak_anonymous_mebibytes": round(peak, 1),
    }


def _family(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(member for child in children for member in _family(int(child)))]


def _anonymous_mebibytes(process: int) -> float:
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def _children_seconds() -> float:
    times = os.times()
    return float(times.children_user + times.children_system)


def by_turns(store: Path, batch_size: int) -> dict[str, Any]:
    """Rows per second of training from the store and from memory, medians over turns, and the ratio of each pair."""
    config = load_config([*KEYS, f"data.path={store}", f"train.global_batch_size={batch_size}"])
    collectives = Collectives(World())
    session = Session(config, load_task(config, collectives), collectives)
    opened = Store(store)
    tensors = {name: tensor.clone() for name, tensor in opened.tensors("train").items()}
    resident = ResidentRows(opened.to_inputs(tensors), tensors["targets"], tensors["rows"])
    feeds = {
        "store": session.feed.steps(Position()),
        "memory": Feed(resident, session.feed.sampler).steps(Position()),
    }
    steps = max(1, ROWS_OF_A_TURN // batch_size)
    rates: dict[str, list[float]] = {name: [] for name in feeds}
    step = 0
    for turn in range(-1, TURNS):  # the first one warms up
        for name in sorted(feeds, reverse=bool(turn % 2)):
            began = time.process_time()
            for batches, _ in islice(feeds[name], steps):
                session.step(batches, step, wants_stop=False)
                step += 1
            if turn >= 0:
                rates[name].append(steps * batch_size / (time.process_time() - began))
    ratios = sorted(a / b for a, b in zip(rates["store"], rates["memory"], strict=True))
    return {
        "rows_per_processor_second": {name: round(statistics.median(values)) for name, values in rates.items()},
        "store_to_memory": {"median": round(statistics.median(ratios), 3), "all": [round(r, 3) for r in ratios]},
    }


def main() -> None:
    """Generate, prepare, train, compare."""
    folder, num_rows = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000_000
    torch.set_num_threads(1)
    write_table(folder / "files", num_rows, rows_of_a_file=2_000_000)
    store, runs = folder / "store", folder / "runs"
    for old in (store, runs):
        shutil.rmtree(old, ignore_errors=True)
    result: dict[str, Any] = {"rows": num_rows, "machine": describe_machine(torch.device("cpu"))}
    result["prepare"] = measured("launch/prepare.py", folder / "files" / "*.parquet", store, *KEYS)
    result["store_bytes"] = sum(file.stat().st_size for file in store.iterdir())
    for name, more in (("train", []), ("train_in_blocks", ["data.shuffle_block_rows=4096", "train.max_steps=300"])):
        result[name] = measured(
            "launch/train.py", *KEYS, f"data.path={store}", f"run.dir={runs}", f"run.name={name}", "train.epochs=1",
            "train.global_batch_size=8192", "wandb.mode=disabled", *more,
        )  # fmt: skip
        summary = json.loads((runs / name / "summary.json").read_text())
        result[name] |= {key: summary[key] for key in ("samples", "samples_per_second")}
    result["by_turns"] = {str(size): by_turns(store, size) for size in (256, 1024, 8192)}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
