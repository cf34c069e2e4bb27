"""The column of weights: read, checked, kept in memory and in a store; never a feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from dist_train.config.load import load_config
from dist_train.data.dataset import Dataset, load_dataset
from dist_train.data.sampler import MicroBatchIndices
from dist_train.data.stores.store import MANIFEST, Store
from dist_train.data.tables.weights import weights_of_column
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.run.session import Session
from dist_train.tasks.registry import load_task
from tests.data.stores import ARGUMENTS, prepare_on_rank, table, write_parts
from tests.dist.sessions import train
from tests.ranks import on_ranks

ALONE = Collectives(World())
WEIGHTED = ["data.split_column=part", "data.weight=exposure"]


def weighted_table(rows: int = 700, **columns: Any) -> pl.DataFrame:
    """The table of the stores with a weight that float32 does not hold exactly."""
    exposure = np.random.default_rng(1).gamma(2.0, size=rows).round(3)
    return table(rows).with_columns(exposure=pl.Series(exposure)).with_columns(**columns)


def load(path: Path, arguments: list[str]) -> Dataset:
    config = load_config([*ARGUMENTS, *arguments, f"data.path={path}"])
    return load_dataset(config.data, ALONE, seed=0, dtype=torch.float32)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_weight_is_no_feature_and_follows_its_row(suffix: str, tmp_path: Path) -> None:
    file, frame = tmp_path / f"t.{suffix}", weighted_table()
    frame.write_csv(file) if suffix == "csv" else frame.write_parquet(file)
    found = load(file, WEIGHTED)
    assert "exposure" not in [column.name for column in (*found.spec.numeric, *found.spec.categorical)]
    for rows in found.splits.values():
        assert rows.weights is not None
        assert rows.weights.tolist() == frame["exposure"][rows.row_numbers.tolist()].to_list()
    train_rows = found.splits["train"]
    batch = train_rows.gather(MicroBatchIndices(torch.tensor([5, 2]), (2,), 0, 0, 2))
    assert batch.weights is not None
    assert batch.weights.tolist() == [train_rows.weights[5].item(), train_rows.weights[2].item()]  # type: ignore[index]
    assert found.spec == load(file, ["data.split_column=part", "data.drop=[client,exposure]"]).spec


def test_a_store_keeps_weights(tmp_path: Path) -> None:
    frame = weighted_table()
    frame.write_csv(tmp_path / "whole.csv")
    prepare_on_rank(ALONE, write_parts(frame, tmp_path / "files"), tmp_path / "store", WEIGHTED)
    memory, store = load(tmp_path / "whole.csv", WEIGHTED), load(tmp_path / "store", WEIGHTED)
    for name, rows in memory.splits.items():
        assert torch.equal(store.splits[name].weights, rows.weights)  # type: ignore[arg-type]
        index = torch.tensor([3, 0, 7])
        ours, theirs = store.splits[name].read(index), rows.read(index)
        assert torch.equal(ours.weights, theirs.weights)  # type: ignore[arg-type]
        assert torch.equal(ours.targets, theirs.targets)
        assert all(map(torch.equal, ours.inputs, theirs.inputs))
    assert '"format": 3' in (tmp_path / "store" / MANIFEST).read_text()
    with pytest.raises(UserError, match=r"data\.weight is None, the store has 'exposure'"):
        load(tmp_path / "store", ["data.split_column=part"])


def test_a_store_without_weights_is_of_the_format_before_them(tmp_path: Path) -> None:
    table().write_parquet(tmp_path / "t.parquet")
    prepare_on_rank(ALONE, [str(tmp_path / "t.parquet")], tmp_path / "store", ["data.split_column=part"])
    assert '"format": 2' in (tmp_path / "store" / MANIFEST).read_text()
    assert Store(tmp_path / "store").settings.weight is None
    with pytest.raises(UserError, match=r"data\.weight is 'exposure', the store has None"):
        load(tmp_path / "store", WEIGHTED)


CELLS: list[tuple[Any, str]] = [
    (None, "data row 3: the cell is missing"),
    (float("nan"), "data row 3: nan is no weight"),
    (-0.5, "data row 3: -0.5 is no weight"),
    (float("inf"), "data row 3: inf is no weight"),
    (1e39, "is no weight"),
]


@pytest.mark.parametrize(("cell", "message"), CELLS)
@pytest.mark.parametrize("text", [False, True])
def test_mistakes_in_a_weight(cell: Any, message: str, text: bool) -> None:
    column = pl.Series("w", [1.0, 0.0, cell])
    column = column.cast(pl.String) if text else column
    expected = message.replace("nan is", "'NaN' is").replace("-0.5 is", "'-0.5' is").replace("inf is", "'inf' is")
    with pytest.raises(UserError, match=expected if text else message):
        weights_of_column(column, "t.csv")


def test_text_is_no_weight() -> None:
    with pytest.raises(UserError, match=r"t\.csv: column 'w', data row 12: 'much' is no weight; data\.weight needs"):
        weights_of_column(pl.Series("w", ["1", "much"]), "t.csv", first_row=10)


@pytest.mark.parametrize(
    ("split", "label", "message"),
    [
        ("train", None, "the weight of every train row is 0"),
        ("val", None, "the weight of every valid row is 0"),
        ("train", "mid", "the weight of every training row of class 'mid' is 0"),
    ],
)
def test_weights_that_leave_nothing_to_count(split: str, label: str | None, message: str, tmp_path: Path) -> None:
    nothing = (pl.col("part") == split) & (pl.col("tier").eq(label) if label else pl.lit(value=True))
    frame = weighted_table(exposure=pl.when(nothing).then(0.0).otherwise(1.0))
    frame.write_parquet(tmp_path / "t.parquet")
    config = load_config([*ARGUMENTS, *WEIGHTED, f"data.path={tmp_path / 't.parquet'}"])
    with pytest.raises(UserError, match=message):
        load_task(config, ALONE)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.target=exposure", "data.weight: 'exposure' is the target"),
        ("data.drop=[exposure]", "data.weight: 'exposure' is in data.drop as well"),
        ("data.categorical=[exposure]", "data.weight: 'exposure' is in data.categorical as well"),
        ("data.split_column=exposure", "data.weight: 'exposure' is data.split_column"),
    ],
)
def test_a_weight_is_nothing_else(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(["data.weight=exposure", argument])


def test_a_job_without_weights_has_no_tensor_of_them(tmp_path: Path) -> None:
    table().write_parquet(tmp_path / "t.parquet")
    config = load_config([*ARGUMENTS, "data.split_column=part", f"data.path={tmp_path / 't.parquet'}"])
    session = Session(config, load_task(config, ALONE), ALONE)
    assert all(rows.weights is None for rows in session.task.splits.values())
    batches, _ = next(session.feed.steps(session.progress.position))
    assert [batch.weights for batch in batches] == [None]


JOB = [
    *ARGUMENTS, *WEIGHTED, "train.epochs=2", "train.global_batch_size=100", "train.class_weights=balanced",
    "model.hidden_dim=16", "optim.lr=1e-2", "train.ema_decay=0.9",
]  # fmt: skip


def test_the_exact_mode_with_weights_is_the_same_bits_on_every_world_size(tmp_path: Path) -> None:
    weighted_table().write_parquet(tmp_path / "t.parquet")
    job = [*JOB, f"data.path={tmp_path / 't.parquet'}", "train.virtual_ranks=4"]
    (alone,) = on_ranks(1, train, job)
    for world in (2, 4):
        for trained in on_ranks(world, train, job):
            assert trained.losses.tobytes() == alone.losses.tobytes()
            for name, value in alone.average.items():
                assert trained.average[name].tobytes() == value.tobytes(), (world, name)
    unweighted = on_ranks(1, train, [a for a in job if a != "data.weight=exposure"] + ["data.drop=[client,exposure]"])
    assert unweighted[0].losses.tobytes() != alone.losses.tobytes()


def test_two_ranks_of_the_fast_mode_weigh_as_one(tmp_path: Path) -> None:
    weighted_table().write_parquet(tmp_path / "t.parquet")
    job = [*JOB, f"data.path={tmp_path / 't.parquet'}", "train.precision=float64"]
    (alone,) = on_ranks(1, train, job)
    for trained in on_ranks(2, train, job):
        np.testing.assert_allclose(trained.losses, alone.losses, rtol=0, atol=1e-10)
