"""Score the rows of a table alone, in batches, in another order and on ranks: how many get other bits.

python -m tests.same_bits.scores RUN WIDE TABLE.parquet FOLDER [--calls N]

WIDE is a run with the weights of RUN whose forward passes have up to 65,536 rows (`evaluation.batch_size`). Files go
into FOLDER. Rows alone and each size of batch are scored by N calls at most. Printed is, for each way to score rows,
how many were scored and how many of them differ, under `differing`; what `evaluate` prints on each number of ranks,
under `metrics`; and a hash of the probabilities.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dist_train import load
from dist_train.distributed.collectives import Collectives
from dist_train.run.scoring.predictor import Predictor
from tests.cli.in_process import command
from tests.commands import run
from tests.ranks import on_ranks

Bits = npt.NDArray[np.int64]

BATCHES = (1, 2, 3, 5, 16, 17, 33, 256, 1000, 4096)
LARGEST = 65_536
RANKS = (1, 3)


def compared(run_dir: Path, wide: Path, table: pl.DataFrame, folder: Path, calls: int) -> dict[str, Any]:
    """What `main` prints. Of the rows, calls / 100 are scored alone by the command `predict` too."""
    model = load(run_dir)
    whole = _bits(model.predict_proba(table))
    order = np.random.default_rng(0).permutation(len(table))
    many = np.arange(LARGEST) % len(table)
    tiled = folder / "tiled.csv"
    table[many.tolist()].write_csv(tiled)
    found: dict[str, list[int]] = {}

    def compare(way: str, scored: Bits, rows: npt.NDArray[np.int64]) -> None:
        assert scored.shape == (len(rows), whole.shape[1])
        found[way] = [len(rows), int((scored != whole[rows]).any(1).sum())]

    compare("API, permuted", _bits(model.predict_proba(table[order.tolist()])), order)
    passes = load(wide)
    assert model.hashes == passes.hashes
    for size in BATCHES:
        rows = np.arange(min(len(table), calls * size))
        compare(f"API, batches of {size}", _in_batches(passes, table[: len(rows)], size), rows)
    compare(f"API, batch of {LARGEST}", _bits(passes.predict_proba(table[many.tolist()])), many)

    permuted = folder / "permuted.csv"
    table[order.tolist()].write_csv(permuted)
    compare("predict, permuted", _predicted(run_dir, permuted), order)
    compare(f"predict, pass of {LARGEST}", _predicted(wide, tiled), many)
    for ranks in RANKS:
        compare(f"predict, {ranks} ranks", _predicted(run_dir, tiled, ranks), many)
    rows = np.linspace(0, len(table) - 1, calls // 100).astype(np.int64)
    compare("predict, alone", np.concatenate(list(_alone(run_dir, table, rows.tolist(), folder))), rows)

    whole = _bits(load(run_dir, calibrated=False).predict_proba(table))
    for ranks in RANKS:
        compare(f"evaluate, {ranks} ranks", on_ranks(ranks, _evaluated, run_dir, tiled)[0], many)
    return {
        "differing": found,
        "metrics": {ranks: _metrics(run_dir, tiled, ranks) for ranks in RANKS},
        "sha256": hashlib.sha256(whole.tobytes()).hexdigest(),
    }


def _bits(probabilities: npt.NDArray[np.float64]) -> Bits:
    return np.ascontiguousarray(probabilities).view(np.int64)


def _in_batches(model: Predictor, table: pl.DataFrame, size: int) -> Bits:
    return np.concatenate([_bits(model.predict_proba(part)) for part in table.iter_slices(size)])


def _predicted(run_dir: Path, source: Path, ranks: int = 1) -> Bits:
    output = source.with_name("scores.csv")
    done = run("predict", run_dir, source, output, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return _read(output)


def _alone(run_dir: Path, table: pl.DataFrame, rows: list[int], folder: Path) -> Iterator[Bits]:
    for row in rows:
        table[row : row + 1].write_csv(folder / "alone.csv")
        done = command("predict", run_dir, folder / "alone.csv", folder / "scores.csv")
        assert done.code == 0, done.err
        yield _read(folder / "scores.csv")


def _read(scores: Path) -> Bits:
    return _bits(pl.read_csv(scores).drop("predicted_class").to_numpy())


def _evaluated(collectives: Collectives, run_dir: Path, source: Path) -> Bits | None:
    """The probabilities that `evaluate` computes its metrics from, on rank 0."""
    found = Predictor(run_dir, collectives).scored_split("test", source)
    assert found is not None
    return None if found[0] is None else _bits(found[0].numpy())


def _metrics(run_dir: Path, source: Path, ranks: int) -> str:
    done = run("evaluate", run_dir, "--data", source, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    """Compare, and print one line of JSON."""
    parser = argparse.ArgumentParser()
    for name in ("run", "wide", "table", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--calls", type=int, default=10_000)
    given = parser.parse_args()
    print(json.dumps(compared(given.run, given.wide, pl.read_parquet(given.table), given.folder, given.calls)))


if __name__ == "__main__":
    main()
