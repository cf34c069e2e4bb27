"""Bins of numeric columns by the target: where a tree splits, on every world size, and what is kept of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.tree import DecisionTreeClassifier

from dist_train.config.compatibility import migrated
from dist_train.config.families import target_bins
from dist_train.config.load import load_config
from dist_train.config.schema import DataConfig
from dist_train.data.dataset import load_dataset
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.models.numeric_embeddings import bin_edges
from tests.cli.in_process import command
from tests.ranks import on_ranks
from tests.resume.jobs import finish, folder_of, tiny_job, write_table

ROWS = 3000


def table(folder: Path) -> Path:
    """Classes that change where `step` is 30 and 80, and with nothing else; every row is a training row."""
    random = np.random.default_rng(0)
    step = random.integers(0, 101, ROWS)
    classes = np.where((step > 30) & (step <= 80), "bad", "good")
    noise = random.standard_normal(ROWS)
    frame = pl.DataFrame({"step": step, "noise": noise, "one": np.ones(ROWS), "y": classes, "s": ["train"] * ROWS})
    holes = pl.when(pl.int_range(ROWS) % 7 == 0).then(None).otherwise(pl.col("noise"))
    others = frame[:40].with_columns(s=pl.when(pl.int_range(40) < 20).then(pl.lit("valid")).otherwise(pl.lit("test")))
    path = folder / "table.parquet"
    pl.concat([frame.with_columns(noise=holes), others]).write_parquet(path)
    return path


def spec_on_rank(collectives: Collectives, path: str, transform: str, num_bins: int | None) -> str:
    data = DataConfig(path=path, target="y", split_column="s", numeric_transform=transform)  # type: ignore[arg-type]
    spec = load_dataset(data, collectives, seed=0, dtype=torch.float32, target_bins=num_bins).spec
    return json.dumps(spec.to_json())


def fitted(path: Path, transform: str = "quantile", num_bins: int | None = 3) -> FeatureSpec:
    return FeatureSpec.from_json(json.loads(spec_on_rank(Collectives(World()), str(path), transform, num_bins)))


def test_bins_meet_where_the_classes_change_and_at_scikit_learns_splits(tmp_path: Path) -> None:
    path = table(tmp_path)
    step, _, one = fitted(path).numeric
    assert step.target_edges == (0, 30, 80, 100)
    assert not one.target_edges
    rows = pl.read_parquet(path).filter(pl.col("s") == "train")
    tree = DecisionTreeClassifier(max_leaf_nodes=3, min_samples_leaf=64).fit(rows.select("step"), rows["y"])
    assert sorted(np.floor(tree.tree_.threshold[tree.tree_.children_left >= 0])) == [30, 80]


@pytest.mark.parametrize("transform", ["robust", "quantile"])
def test_knots_of_a_model_are_encoded_edges(tmp_path: Path, transform: str) -> None:
    for column in fitted(table(tmp_path), transform, 8).numeric[:2]:
        edges = bin_edges(column, 8, "target")
        assert 2 <= len(edges) <= 9
        assert edges.diff().min() > 0
        assert not set(column.target_edges[1:-1]) - set(column.quantiles)


def test_they_are_the_same_for_every_world_size_and_are_made_on_demand_alone(tmp_path: Path) -> None:
    path = str(table(tmp_path))
    alone = spec_on_rank(Collectives(World()), path, "quantile", 8)
    assert on_ranks(3, spec_on_rank, path, "quantile", 8) == [alone] * 3
    without = spec_on_rank(Collectives(World()), path, "quantile", None)
    assert "target_edges" not in without
    spec, plain = (FeatureSpec.from_json(json.loads(text)) for text in (alone, without))
    assert spec.matches(plain)
    assert not spec.matches(replace(spec, numeric=(replace(spec.numeric[0], target_edges=(0, 1)), *spec.numeric[1:])))


def test_a_column_without_them_is_refused() -> None:
    column = FeatureSpec.from_json(json.loads(json.dumps(SPEC_WITHOUT))).numeric[0]
    with pytest.raises(UserError, match=r"column 'x' was encoded without bins by the target.*prepared table"):
        bin_edges(column, 4, "target")


SPEC_WITHOUT = {
    "format": 2,
    "numeric": [{"name": "x", "median": 0.0, "scale": 1.0, "has_missing_flag": False, "quantiles": [0.0, 1.0, 2.0]}],
    "categorical": [],
    "class_names": ["a", "b"],
}


def test_they_are_wanted_by_piecewise_linear_embeddings_alone_and_a_run_of_before_had_quantiles() -> None:
    keys = ["model.name=tabm", "model.tabm.numeric_bins_by=target", "model.tabm.numeric_bins=5"]
    assert target_bins(load_config(keys).model) == 5
    assert target_bins(load_config([*keys, "model.tabm.numeric_embedding=periodic"]).model) is None
    assert target_bins(load_config([]).model) is None
    before = {"model": {"name": "tabm", "tabm": {"numeric_embedding": "none"}, "dropout": 0.1}}
    assert migrated(before)["model"]["tabm"]["numeric_bins_by"] == "quantiles"


def test_a_run_with_them_is_verified_and_predicts_and_a_store_is_refused(tmp_path: Path) -> None:
    clients = write_table(tmp_path / "clients.csv")
    keys = ("model.name=tabm", "model.tabm.members=2", "model.tabm.width=8", "model.tabm.numeric_bins_by=target")
    arguments = tiny_job(clients, tmp_path / "run", "train.virtual_ranks=2", "train.max_steps=6", *keys)
    finish(arguments)
    verified = command("verify", folder_of(arguments))
    assert verified.code == 0, verified.err
    assert command("predict", folder_of(arguments), clients, tmp_path / "out.parquet").code == 0
    store = tmp_path / "store"
    assert command("prepare", clients, store, "data.target=grade").code == 0
    refused = command("train", *tiny_job(store, tmp_path / "other", *keys))
    assert refused.code == 2
    assert "numeric_bins_by=target" in refused.err
