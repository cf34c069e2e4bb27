"""Tables of thousands of columns: what a column costs does not depend on how many there are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from dist_train.config.schema import DataConfig
from dist_train.data.dataset import load_dataset
from dist_train.data.quantiles import exact_quantiles
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from tests.ranks import on_ranks

FRACTIONS = [0.0, 0.25, 0.3, 0.5, 1.0]


def columns() -> Tensor:
    random = np.random.default_rng(0)
    values = random.normal(size=(57, 6)) * 10.0 ** random.integers(-300, 300, (57, 6))
    values[:, 1] = random.choice([0.0, -0.0, 1.0], 57)
    values[random.random((57, 6)) < 0.2] = np.nan
    values[:, 2] = np.nan
    values[5, 0] = -np.nan
    return torch.from_numpy(values)


def quantiles(collectives: Collectives, num_rows: int | None) -> tuple[bytes, list[int]]:
    def pieces() -> Iterator[list[Tensor]]:
        for part in columns().chunk(5)[collectives.rank :: collectives.size]:
            yield list(part.unbind(1))

    found, present = exact_quantiles(pieces, 6, FRACTIONS, collectives, num_rows)
    return found.masked_fill(found.isnan(), torch.nan).numpy().tobytes(), present.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_few_rows_are_sorted_to_the_bits_of_many(world_size: int) -> None:
    expected = quantiles(Collectives(World()), None)
    assert all(of_rank == expected for of_rank in on_ranks(world_size, quantiles, 57))


@pytest.mark.parametrize("kind", ["numbers", "booleans"])
def test_a_column_takes_milliseconds(kind: str, tmp_path: Path) -> None:
    """Of this process; on a present core 0.5 ms. It took 18 ms."""
    random, width = np.random.default_rng(0), 1500
    cells = random.normal(size=(width, 60)) if kind == "numbers" else random.random((width, 60)) < 0.5
    frame = pl.DataFrame({f"g{i}": column for i, column in enumerate(cells)})
    frame.with_columns(y=pl.Series(["no", "yes"] * 30)).write_parquet(tmp_path / "t.parquet")
    data = DataConfig(path=str(tmp_path / "t.parquet"), target="y")
    began = time.process_time()
    dataset = load_dataset(data, Collectives(World()), seed=0, dtype=torch.float32)
    assert dataset.spec.num_columns == width
    assert (time.process_time() - began) / width < 5e-3
