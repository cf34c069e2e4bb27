"""Try many tables and configurations: whatever is not trained on is refused in one printable line each.

    python -m tests.fuzz --cases 50000 --processes 2          # make fuzz
    python -m tests.fuzz --only 1234                          # one case, with its traceback

Exit code 1: a case broke something else than a rule; its number is printed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing as mp
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from dist_train.config.load import config_to_yaml, load_config, read_config
from dist_train.config.members import members_of
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import Mistakes, UserError
from dist_train.tasks.tabular import TabularTask
from tests.fuzz.generate import Case, make_case

PROGRESS_EVERY = 1000


def outcome_of(number: int, seed: int = 0) -> str:
    """`accepted`, `refused: configuration`, `refused: table`, or `FAULT` and why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return try_case(make_case(number, seed, Path(folder)), Path(folder))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"FAULT {type(error).__name__}: {str(error)[:200]!r} ({last.filename}:{last.lineno})"


def try_case(case: Case, folder: Path) -> str:
    """What becomes of a case. Raises whatever is no mistake of a user."""
    try:
        config = load_config(case.arguments)
        saved = folder / "config.yaml"
        saved.write_text(config_to_yaml(config), encoding="utf-8")
        assert read_config(saved) == config, f"{config} was read back as {read_config(saved)}"
        assert load_config([], base=config) == config
    except UserError as error:
        return _checked(error, "configuration")
    if case.table is None:
        return "accepted"
    members = members_of(config)
    try:
        task = TabularTask.load(members[0].config if members else config, Collectives(World()))
        task.model()
    except UserError as error:
        return _checked(error, "table")
    assert case.other
    try:
        _encoded(task, case.other)
    except UserError as error:
        return _checked(error, "table to score")
    return "accepted"


def _encoded(task: TabularTask, file: Path) -> None:
    from dist_train.data.tables.table import locate, read_table

    task.unlabelled(read_table(locate(str(file)), task.config.data.missing_values), str(file))


def _checked(error: UserError, what: str) -> str:
    lines = str(error).split("\n") if isinstance(error, Mistakes) else [str(error)]
    assert all(line.isprintable() and line.strip() for line in lines), f"not a printable line: {lines}"
    return f"refused: {what}"


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("dist_train").setLevel(logging.CRITICAL)


def _try(task: tuple[int, int]) -> tuple[int, str]:
    return task[0], outcome_of(*task)


def main() -> int:
    """Run the cases; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="one case, with its traceback")
    chosen = parser.parse_args()
    _quiet()
    if chosen.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(chosen.only, chosen.seed, Path(folder))
            print(case, *(f"{p}: {p.read_bytes()[:600]!r}" for p in sorted(Path(folder).iterdir())), sep="\n")
            print(try_case(case, Path(folder)))
        return 0
    began, seen = time.monotonic(), Counter[str]()
    tasks = ((number, chosen.seed) for number in range(chosen.start, chosen.start + chosen.cases))
    # A pool whose processes are missed when the system kills one for its memory.
    with ProcessPoolExecutor(chosen.processes, mp.get_context("fork"), _quiet) as pool:
        for number, said in pool.map(_try, tasks, chunksize=50):
            seen[said.partition(" ")[0] if said.startswith("FAULT") else said] += 1
            if said.startswith("FAULT"):
                print(f"case {number}: {said}", flush=True)
            if seen.total() % PROGRESS_EVERY == 0:
                print(f"{seen.total():,} cases in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(f"{seen.total():,} cases in {time.monotonic() - began:.0f} s: {dict(seen)}")
    return int(seen["FAULT"] > 0)


if __name__ == "__main__":
    sys.exit(main())
