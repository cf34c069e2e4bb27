"""Tables in files, and stores made of them on any number of ranks, for the tests."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars as pl

from dist_train.config.load import load_config
from dist_train.data.stores import store
from dist_train.distributed.collectives import Collectives
from dist_train.run.preparation import Preparation


def table(num_rows: int = 700) -> pl.DataFrame:
    """Numbers with holes, categories with holes, codes, and a column of text most of which could be numbers."""
    random = np.random.default_rng(5)

    def holes(values: pl.Series, share: float) -> pl.Series:
        return values.set(pl.Series(random.random(num_rows) < share), None)

    return pl.DataFrame(
        {
            "income": holes(pl.Series(np.exp(random.normal(8, 2, num_rows))), 0.1),
            "age": random.integers(18, 90, num_rows),
            "purpose": holes(pl.Series(random.choice(["car", "house", "träume, groß"], num_rows)), 0.05),
            # The first half are numbers, and too few of all cells for a column of numbers with stray text.
            "branch": [str(i % 7) if i < num_rows // 3 else "abcdefg"[i % 7] for i in range(num_rows)],
            "code": random.integers(0, 5, num_rows),
            "client": range(num_rows),
            "tier": random.choice(["low", "high", "mid"], num_rows, p=[0.5, 0.3, 0.2]),
            "part": random.choice(["train", "val", "test"], num_rows, p=[0.6, 0.2, 0.2]),
        }
    )


def write_parts(frame: pl.DataFrame, folder: Path) -> list[str]:
    """The table in four files of both formats, their columns in different orders; the patterns that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [0, frame.height // 5, frame.height // 2, frame.height * 2 // 3, frame.height]
    parts = [frame[begin:end] for begin, end in pairwise(ends)]
    parts[0].write_csv(folder / "a-0.csv")
    parts[1].select(frame.columns[::-1]).write_parquet(folder / "a-1.parquet", row_group_size=40)
    parts[2].write_csv(folder / "a-2.csv")
    parts[3].write_parquet(folder / "b.parquet")
    return [str(folder / "a-*"), str(folder / "b.parquet")]


ARGUMENTS = ["data.target=tier", "data.drop=[client]", "data.categorical=[code]"]


def prepare_on_rank(
    collectives: Collectives, patterns: list[str], output: Path, arguments: list[str], block_rows: int = 64
) -> None:
    """What `launch/prepare.py` does, in blocks that are small enough for a test."""
    config = load_config([*ARGUMENTS, *arguments])
    with (
        ExitStack() as stack,
        patch.object(store, "_MAX_BLOCK_ROWS", block_rows),
        patch.object(store, "_MIN_BLOCK_ROWS", block_rows),
    ):
        Preparation(patterns, output, config, collectives, stack).run({"process": "test"})
