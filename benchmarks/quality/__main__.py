"""Make the leaderboard: `make bench-quality`. A part of it, beside what is measured already:

python -m benchmarks.quality --table small --contestant any_table --contestant lightgbm --seed 0

Each contestant runs as a process of its own, with one thread. Its log loss on the validation and the test rows, its
wall time and its processor time, both from the start of the command, are written to benchmarks/results/quality.json as
soon as they are known. A log loss that is there is not measured again (`--again` does). docs/quality.md and the
leaderboard of the README are made of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.page import write_leaderboard, write_page
from benchmarks.quality.peers import PEERS, missing_package
from benchmarks.quality.tables import TABLES, write

REPOSITORY = Path(__file__).parent.parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "quality.json"
OWN = {
    "any_table": ["configs/any_table.yaml"],
    "any_table_best": ["configs/any_table_best.yaml"],
    "financial_classifier": ["configs/credit_risk.yaml"],
}
"""Contestants of this project -> their configuration."""
CONTESTANTS = [*OWN, *PEERS]
SEEDS = (0, 1, 2)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LOKY_MAX_CPU_COUNT"), "1")


def main() -> None:
    """Measure what is asked for and not known yet; write the pages."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seed or SEEDS:
            for table in arguments.table or TABLES:
                for contestant in arguments.contestant or CONTESTANTS:
                    former = _known()["results"].get(table, {}).get(contestant, {}).get(str(seed), {})
                    if "test" in former and not arguments.again:
                        continue
                    result = measure(contestant, table, seed, arguments.tables, Path(folder))
                    print(table, contestant, seed, json.dumps(result), flush=True)
                    _store(table, contestant, seed, result)
    write_page(_known(), REPOSITORY / "docs" / "quality.md")
    write_leaderboard(_known(), REPOSITORY / "README.md")


def measure(contestant: str, table: str, seed: int, tables: Path, folder: Path) -> dict[str, Any]:
    """Log losses and seconds of one run, or why there are none."""
    if contestant in PEERS and missing_package(contestant):
        return {"skipped": f"{missing_package(contestant)} is not installed"}
    file = write(table, tables)
    run = folder / f"{contestant}-{table}-{seed}"
    if contestant in OWN:
        command = [sys.executable, "launch/train.py", *OWN[contestant], *_settings(file, seed, run)]
    else:
        command = [sys.executable, "-m", "benchmarks.quality.peers", contestant, str(file), f"--seed={seed}"]
    found = _timed(command)
    if "skipped" in found:
        return found
    if contestant in OWN:
        summary = json.loads((run / "summary.json").read_text())
        return {"valid": summary["valid"]["loss"], "test": summary["test"]["loss"], **found["took"]}
    return json.loads(found["out"].splitlines()[-1]) | found["took"]  # type: ignore[no-any-return]


def _settings(file: Path, seed: int, run: Path) -> list[str]:
    return [
        f"data.path={file}", "data.target=target", "data.split_column=split", f"run.seed={seed}",
        f"run.dir={run.parent}", f"run.name={run.name}", "run.resume=never",
        "runtime.device=cpu", "wandb.mode=disabled",
    ]  # fmt: skip


def _timed(command: list[str]) -> dict[str, Any]:
    """The output of a command, its wall and processor seconds; or its last line where it failed."""
    before, start = os.times(), time.perf_counter()
    environ = os.environ | _ONE_THREAD
    done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        return {"skipped": f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"}
    processor = after.children_user - before.children_user + after.children_system - before.children_system
    return {"out": done.stdout, "took": {"wall_seconds": round(wall, 2), "cpu_seconds": round(processor, 2)}}


def _known() -> dict[str, Any]:
    """All results there are."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": {}}  # type: ignore[no-any-return]


def _store(table: str, contestant: str, seed: int, result: Mapping[str, Any]) -> None:
    """Put a result beside the others, with the machine and the commit of this one."""
    import torch

    from dist_train.system.machine import describe_machine

    show = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(show, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
    results = _known()["results"]
    results.setdefault(table, {}).setdefault(contestant, {})[str(seed)] = {**result, "commit": commit}
    aside = RESULTS.with_suffix(".partial")
    aside.write_text(
        json.dumps({"machine": describe_machine(torch.device("cpu")), "results": results}, indent=1) + "\n"
    )
    aside.replace(RESULTS)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="append", choices=list(TABLES), help="may be given several times")
    parser.add_argument("--contestant", action="append", choices=CONTESTANTS, help="may be given several times")
    parser.add_argument("--seed", action="append", type=int, help="may be given several times (default: 0, 1, 2)")
    parser.add_argument("--again", action="store_true", help="measure what is known as well")
    default = Path(tempfile.gettempdir()) / "dist_train-quality"
    parser.add_argument("--tables", type=Path, default=default, help=f"where the tables are kept (default: {default})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
