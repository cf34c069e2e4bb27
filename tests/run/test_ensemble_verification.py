"""An ensemble is verified whole: each member is replayed, and what the members make together is made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.load import load_config
from dist_train.distributed.world import World
from dist_train.run.checkpoint.commit import commit
from dist_train.run.checkpoint.state import encode_parts, read_parts, weights_sha256
from dist_train.run.job import train
from tests.cli.in_process import command
from tests.resume.jobs import tiny_job, write_table

FOLDS = ("train.max_steps=6", "data.folds=2", "data.split_column=null", "train.virtual_ranks=2")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ensemble of two folds."""
    folder = tmp_path_factory.mktemp("folds")
    write_table(folder / "table.csv")
    assert train(load_config(tiny_job(folder / "table.csv", folder / "run", *FOLDS)), World(), {})
    return folder / "run"


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    """The same, to be altered."""
    shutil.copytree(honest, tmp_path / "run")
    return tmp_path / "run"


def test_an_honest_ensemble_is_believed(honest: Path) -> None:
    before = {p: p.read_bytes() for p in honest.rglob("*") if p.is_file()}
    seen = command("verify", honest)
    assert seen.code == 0, seen.err
    report = json.loads(seen.out)
    summary = json.loads((honest / "summary.json").read_text())
    assert report["difference"] is None
    assert report["model_compared"] is True
    assert report["weights_sha256"] == summary["weights_sha256"]
    assert list(report["members"]) == ["fold_0", "fold_1"]
    assert all(member["model_compared"] for member in report["members"].values())
    assert {p: p.read_bytes() for p in honest.rglob("*") if p.is_file()} == before


def altered_member(run: Path) -> None:
    """Another number in a line of metrics."""
    file = run / "fold_1" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["loss"] += 1e-9
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def altered_weights(run: Path) -> None:
    """A model that is sound in itself, and not made of the members."""
    parts: dict[str, Any] = read_parts(run / "model")
    name, tensor = next((n, t) for n, t in parts["model.pth"].items() if t.is_floating_point() and t.ndim)
    parts["model.pth"][name] = tensor + 1e-6
    parts["ensemble.json"]["weights_sha256"] = weights_sha256(parts["model.pth"])
    shutil.rmtree(run / "model")
    commit(run / "model", encode_parts(parts), lambda: None)


def altered_description(run: Path) -> None:
    """Two members change their places."""
    parts: dict[str, Any] = read_parts(run / "model")
    parts["ensemble.json"]["members"].reverse()
    shutil.rmtree(run / "model")
    commit(run / "model", encode_parts(parts), lambda: None)


def altered_metrics(run: Path) -> None:
    """A better loss on the test rows."""
    summary = json.loads((run / "summary.json").read_text())
    summary["test"]["loss"] -= 1e-9
    (run / "summary.json").write_text(json.dumps(summary))


def altered_predictions(run: Path) -> None:
    """One byte less."""
    file = run / "out_of_fold.parquet"
    file.write_bytes(file.read_bytes()[:-1])


def damaged_model(run: Path) -> None:
    """A bit of the weights."""
    content = bytearray((run / "model" / "model.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "model" / "model.pth").write_bytes(content)


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (altered_member, "member fold_1, step "),
        (altered_weights, "is not that of the members"),
        (altered_description, "ensemble.json: members is not that of the members"),
        (altered_metrics, "the summary's test loss is not what the members have"),
        (altered_predictions, "out_of_fold.parquet is not what the members predict"),
        (damaged_model, "the trained model does not verify"),
    ],
)
def test_what_was_altered_is_named(copy: Path, alter: Callable[[Path], None], said: str) -> None:
    alter(copy)
    seen = command("verify", copy)
    assert seen.code == 1
    assert said in seen.err.strip().splitlines()[-1]
    assert said in json.loads(seen.out)["difference"]


def test_steps_are_those_of_a_member(honest: Path) -> None:
    seen = command("verify", honest, "--steps", "2:4")
    assert seen.code == 2
    assert "is an ensemble: the steps are those of a member" in seen.err


def test_an_ensemble_that_is_not_finished_has_no_whole_yet(copy: Path) -> None:
    (copy / "summary.json").unlink()
    seen = command("verify", copy)
    assert seen.code == 0
    assert json.loads(seen.out)["model_compared"] is False
    shutil.rmtree(copy / "fold_1")
    seen = command("verify", copy)
    assert seen.code == 2
    assert "fold_1: is not a run folder" in seen.err
