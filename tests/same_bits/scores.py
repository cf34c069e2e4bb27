"""Score a table whole, in batches, in another order and row by row: how many rows have other bits than in the whole.

python -m tests.same_bits.scores RUN TABLE.parquet
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from dist_train import load

BATCHES = {1: 200, 2: 400, 7: 700, 16: 1600, 33: 3300, 100: 5000, 1000: 10_000, 4096: 10_000}
"""Rows of a batch -> how many rows of the table are scored in such batches."""


def differing(run: Path, table: pl.DataFrame) -> dict[str, int]:
    """Rows that differ, by the way that they were scored."""
    model = load(run)
    whole = model.predict_proba(table).view(np.int64)

    def batches(size: int, end: int) -> Iterator[np.ndarray]:
        for start in range(0, end, size):
            yield model.predict_proba(table[start : min(start + size, end)])

    found = {}
    for size, rows in BATCHES.items():
        scored = np.concatenate(list(batches(size, min(rows, len(table)))))
        found[f"batches of {size}"] = int((scored.view(np.int64) != whole[: len(scored)]).any(1).sum())
    order = np.random.default_rng(0).permutation(len(table))
    scored = np.ascontiguousarray(model.predict_proba(table[order.tolist()])).view(np.int64)
    return found | {"permuted": int((scored != whole[order]).any(1).sum())}


if __name__ == "__main__":
    print(json.dumps(differing(Path(sys.argv[1]), pl.read_parquet(sys.argv[2]))))
