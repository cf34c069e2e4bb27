"""The exact mode's promise for families of models that are computed slice by slice as wholes."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from tests.cli.in_process import command
from tests.resume.jobs import Trap, finish, folder_of, outcome, run_job, tiny_job, write_table

FAMILIES = {
    "tabm": [
        "model.name=tabm", "model.tabm.members=4", "model.tabm.width=8", "model.tabm.category_widths={region: 3}",
        "model.tabm.category_frequencies=true", "data.max_categories=1", "data.hash_buckets=3",
        "data.numeric_transform=quantile",
    ],
    "resnet": ["model.name=resnet", "model.resnet.width=8", "model.resnet.category_widths={region: 3}"],
    "realmlp": [
        "model.name=realmlp", "model.realmlp.width=8", "model.realmlp.activation=mish",
        "model.realmlp.numeric_embedding=periodic", "data.numeric_transform=quantile",
    ],
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> list[str]:
    return FAMILIES[request.param]


def test_everything_on_and_empty_slices_are_the_same_bits_after_a_kill_too(tmp_path: Path, family: list[str]) -> None:
    # 16 rows in two passes of 12 slices: each has empty ones. The moving average is in each tiny job.
    table = write_table(tmp_path / "clients.csv")
    more = ("train.virtual_ranks=12", "train.max_steps=8", "train.class_weights=balanced", *family)
    alone = finish(tiny_job(table, tmp_path / "alone", *more), 1)
    several = tiny_job(table, tmp_path / "several", *more)
    assert run_job(several, 2, Trap(step=7)).killed
    assert run_job(several, 2).codes == [0] * 2
    assert outcome(folder_of(several)) == alone


@pytest.mark.slow
def test_row_weights_on_1_2_4_and_8_ranks_are_the_same_bits(tmp_path: Path, family: list[str]) -> None:
    frame = pl.read_csv(write_table(tmp_path / "plain.csv"))
    table = tmp_path / "clients.csv"
    frame.with_columns(exposure=pl.int_range(frame.height) % 7 / 4 + 0.25).write_csv(table)
    more = ("data.weight=exposure", "train.virtual_ranks=8", "train.max_steps=12", *family)
    alone = finish(tiny_job(table, tmp_path / "alone", *more), 1)
    for world in (2, 4, 8):
        several = tiny_job(table, tmp_path / str(world), *more)
        assert run_job(several, world, Trap(step=9)).killed
        assert finish(several, world) == alone, world
    verified = command("verify", folder_of(several))
    assert verified.code == 0, verified.err


@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_fast_runs_train_on_several_ranks(tmp_path: Path, family: list[str], precision: str) -> None:
    table = write_table(tmp_path / "clients.csv")
    more = ("train.max_steps=7", f"train.precision={precision}", *family)
    one, two = (finish(tiny_job(table, tmp_path / str(world), *more), world) for world in (1, 2))
    assert one["steps"] == two["steps"]
    # In float32 and below a rounding may turn a ReLU, and the two trainings part.
    lines, tolerance = (2, 1e-9) if precision == "float64" else (1, 0.05)
    for ours, theirs in zip(one["lines"][:lines], two["lines"][:lines], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance)


def test_a_run_is_verified_evaluated_and_predicts_from_a_store(tmp_path: Path, family: list[str]) -> None:
    table = write_table(tmp_path / "clients.csv")
    store = tmp_path / "store"
    of_data = [key for key in family if key.startswith("data.")]
    assert command("prepare", table, store, "data.target=grade", *of_data).code == 0
    arguments = tiny_job(store, tmp_path / "run", "train.virtual_ranks=2", "train.max_steps=12", *family)
    dry = command("train", *arguments, "--dry-run")
    assert dry.code == 0, dry.err
    assert not folder_of(arguments).exists()
    trained = finish(arguments)
    verified = command("verify", folder_of(arguments))
    assert verified.code == 0, verified.err
    evaluated = command("evaluate", folder_of(arguments), "--split", "test")
    assert json.loads(evaluated.out)["test"]["loss"] == pytest.approx(trained["test"]["loss"], rel=1e-6)
    predicted = command("predict", folder_of(arguments), table, tmp_path / "out.parquet")
    assert predicted.code == 0, predicted.err
    assert pl.read_parquet(tmp_path / "out.parquet").height == 150
