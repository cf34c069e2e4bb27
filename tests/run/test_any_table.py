"""The shipped defaults for a table that nobody has seen, on one: a path and a target are enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dist_train import Classifier, load
from dist_train.config.load import load_config, read_config
from dist_train.distributed.world import World
from dist_train.run.job import train
from tests.commands import REPOSITORY

FEW_STEPS = ("train.max_steps=4", "wandb.mode=disabled", "runtime.device=cpu", "run.dir={folder}")


def unseen_table(folder: Path) -> Path:
    """300 rows: numbers with missing cells, a column of text, a target."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3))
    frame = pl.DataFrame({f"x{i}": x[:, i] for i in range(3)}).with_columns(
        pl.when(pl.col("x1") > 1).then(None).otherwise(pl.col("x1")).alias("x1"),
        pl.Series("city", [f"c{i % 7}" for i in range(300)]),
        pl.Series("grade", np.where(x[:, 0] + x[:, 2] > 0, "good", "bad")),
    )
    frame.write_csv(folder / "table.csv")
    return folder / "table.csv"


@pytest.mark.parametrize(("name", "more"), [("any_table", ()), ("any_table_best", ("data.folds=2",))])
def test_a_path_and_a_target_are_enough(name: str, more: tuple[str, ...], tmp_path: Path) -> None:
    table = unseen_table(tmp_path)
    few = [setting.format(folder=tmp_path) for setting in FEW_STEPS]
    arguments = [str(REPOSITORY / "configs" / f"{name}.yaml"), f"data.path={table}", "data.target=grade", *few, *more]
    summary = train(load_config(arguments), World(), {})
    assert summary is not None
    run = tmp_path / name
    trained = read_config((run / "fold_1" if more else run) / "config.yaml")
    assert trained.task.auto == []
    assert trained.train.global_batch_size == 32
    probabilities = load(run).predict_proba(table)
    assert probabilities.shape == (300, 2)
    assert np.allclose(probabilities.sum(1), 1)


def test_the_estimator_takes_them_too(tmp_path: Path) -> None:
    frame = pl.read_csv(unseen_table(tmp_path))
    config = REPOSITORY / "configs" / "any_table.yaml"
    classifier = Classifier(config, device="cpu", overrides=["train.max_steps=2"])
    assert classifier.fit(frame.drop("grade"), frame["grade"]).predict_proba(frame.drop("grade")).shape == (300, 2)
