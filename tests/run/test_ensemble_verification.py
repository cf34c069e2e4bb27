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
from dist_train.run.verification.challenge import draw
from tests.cli.in_process import command
from tests.resume.jobs import tiny_job, write_table
from tests.run.forging import forge_chain

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


def test_a_challenge_draws_from_the_windows_of_all_members(honest: Path) -> None:
    seen = command("verify", honest, "--challenge", 99, "--challenge-seed", 1)
    assert seen.code == 0, seen.err
    report, whole = json.loads(seen.out), json.loads(command("verify", honest).out)
    windows = [[name, *window] for name in ("fold_0", "fold_1") for window in ([0, 5], [5, 6])]
    assert report["challenge"] == {
        "seed": 1, "windows": 4, "drawn": windows, "probability": 1, "differing": []
    }  # fmt: skip
    names = ("lines", "checkpoints", "model_compared", "weights_sha256", "data_sha256")
    for name, of_member in whole["members"].items():
        assert {n: report["members"][name][n] for n in names} == {n: of_member[n] for n in names}
    assert report["model_compared"]
    assert report["weights_sha256"] == whole["weights_sha256"]


def test_a_challenge_of_an_ensemble_finds_an_altered_window_where_it_is_drawn(copy: Path) -> None:
    altered_member(copy)
    forge_chain(copy / "fold_1")
    whole: dict[str, Any] = read_parts(copy / "model")
    whole["ensemble.json"]["members"][1]["model.json"] = read_parts(copy / "fold_1" / "model")["model.json"]
    commit(copy / "model", encode_parts(whole))
    altered = ("fold_1", 0, 5)
    windows = [(name, *window) for name in ("fold_0", "fold_1") for window in ((0, 5), (5, 6))]
    with_it = next(seed for seed in range(99) if draw(windows, 1, seed) == [altered])
    seen = command("verify", copy, "--challenge", 1, "--challenge-seed", with_it)
    assert seen.code == 1
    assert "the window fold_1 0:5 differs" in seen.err
    assert seen.err.strip().splitlines()[-1].startswith("error: member fold_1, step ")
    assert json.loads(seen.out)["challenge"]["differing"] == [list(altered)]
    without = next(seed for seed in range(99) if altered not in draw(windows, 3, seed))
    seen = command("verify", copy, "--challenge", 3, "--challenge-seed", without)
    assert seen.code == 0, seen.err
    assert "one altered window of 4 is found with probability 0.75" in seen.err


def test_a_challenge_begins_only_where_each_member_is_that_of_its_chain(copy: Path) -> None:
    altered_member(copy)
    seen = command("verify", copy, "--challenge", 1)
    assert seen.code == 1
    assert "member fold_1" in seen.err
    assert json.loads(seen.out)["challenge"] is None


def test_an_ensemble_that_is_not_finished_has_no_whole_yet(copy: Path) -> None:
    (copy / "summary.json").unlink()
    seen = command("verify", copy)
    assert seen.code == 0
    assert json.loads(seen.out)["model_compared"] is False
    shutil.rmtree(copy / "fold_1")
    seen = command("verify", copy)
    assert seen.code == 2
    assert "fold_1: is not a run folder" in seen.err
