"""Runs that differ in their seed become one model, which is used like any other one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import dist_train
from dist_train.config.load import load_config
from dist_train.config.members import members_of
from dist_train.distributed.stopping import StopRequest
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.run.job import Job, train
from tests.resume.jobs import run_job, tiny_job, write_table


def _arguments(folder: Path, *more: str) -> list[str]:
    table = folder / "table.csv"
    if not table.exists():
        write_table(table)
    return tiny_job(table, folder / "run", "train.epochs=2", "ensemble.seeds=3", *more)


def _train(folder: Path, *more: str) -> dict[str, Any]:
    summary = train(load_config(_arguments(folder, *more)), World(), {})
    assert summary is not None
    return summary


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An ensemble of three seeds, and its summary."""
    folder = tmp_path_factory.mktemp("ensemble")
    return folder, _train(folder)


def test_probabilities_are_the_mean_over_the_members(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    table = pl.read_csv(folder / "table.csv")
    members = [dist_train.load(folder / "run" / f"seed_{i}", calibrated=False).predict_proba(table) for i in range(3)]
    assert not np.array_equal(members[0], members[1])
    ensemble = dist_train.load(folder / "run", calibrated=False).predict_proba(table)
    assert np.array_equal(ensemble, (members[0] + members[1] + members[2]) / 3)
    assert np.array_equal(ensemble, dist_train.load(folder / "run" / "model", calibrated=False).predict_proba(table))


def test_all_members_have_one_split_and_the_summary_is_of_the_whole(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = trained
    records = [json.loads((folder / "run" / f"seed_{i}" / "split.json").read_text()) for i in range(3)]
    assert len({record["rows_sha256"] for record in records}) == 1
    evaluated = dist_train.load(folder / "run").evaluate("test")
    assert evaluated == summary["test"]
    assert json.loads((folder / "run" / "summary.json").read_text()) == summary
    losses = [member["test"]["loss"] for member in summary["ensemble"]["members"]]
    spread = summary["ensemble"]["of_members"]["test"]["loss"]
    assert spread == {"mean": pytest.approx(np.mean(losses)), "std": pytest.approx(np.std(losses, ddof=1))}
    assert summary["test"]["loss"] < spread["mean"]  # Jensen: the logarithm is concave


def test_a_finished_ensemble_is_left_alone(
    trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary = trained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr("dist_train.run.job.build_loop", None)
    assert _train(folder) == summary
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_ensemble_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = _train(tmp_path / "a")
    trained: list[str] = []
    run: Callable[..., Any] = Job.run

    def killed_before_the_third(self: Job, *, dry_run: bool) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(self.config.run.name)
        return run(self, dry_run=dry_run)

    with monkeypatch.context() as patched:
        patched.setattr(Job, "run", killed_before_the_third)
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path / "b")
    assert not (tmp_path / "b" / "run" / "model").exists()
    with pytest.raises(UserError, match="not finished"):
        dist_train.load(tmp_path / "b" / "run")
    checkpoints = tmp_path / "b" / "run" / "seed_0" / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")}
    assert _train(tmp_path / "b")["test"] == whole["test"]
    assert {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")} == before


def test_an_ensemble_that_is_told_to_stop_leaves_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = StopRequest.wanted

    def in_the_second_member(self: StopRequest) -> bool:
        if (tmp_path / "run" / "seed_1" / "config.yaml").exists() and not (tmp_path / "run" / "requeue").exists():
            self.cause = "a test"
        return wanted(self)

    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "wanted", in_the_second_member)
        assert train(load_config(_arguments(tmp_path)), World(), {}) is None
    marker = json.loads((tmp_path / "run" / "requeue").read_text())
    assert marker["cause"] == "a test"
    assert not (tmp_path / "run" / "seed_2").exists()
    assert len(_train(tmp_path)["ensemble"]["members"]) == 3
    assert not (tmp_path / "run" / "requeue").exists()


def test_mistakes_cost_one_line(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = trained
    with pytest.raises(UserError, match=r"without checkpoints: name a member, as .*seed_0"):
        dist_train.load(folder / "run", "last")
    with pytest.raises(UserError, match="holds an ensemble"):
        _train(folder, "ensemble.seeds=1")
    with pytest.raises(UserError, match="no such file"):
        _train(tmp_path, "data.path=nowhere.csv")
    assert not (tmp_path / "run").exists()


def test_the_first_member_is_the_run_without_an_ensemble(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = trained
    arguments = tiny_job(folder / "table.csv", tmp_path / "run", "train.epochs=2")
    alone = train(load_config(arguments), World(), {})
    assert alone is not None
    assert alone["weights_sha256"] == summary["ensemble"]["members"][0]["weights_sha256"]


def test_ranks_give_the_ensemble_of_one_process(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, "train.virtual_ranks=2", "ensemble.seeds=2", "train.max_steps=5")
    alone = train(load_config(arguments), World(), {})
    assert alone is not None
    assert run_job([*arguments, "run.name=ranks"], ranks=2).codes == [0, 0]
    together = json.loads((tmp_path / "ranks" / "summary.json").read_text())
    assert together["weights_sha256"] == alone["weights_sha256"]
    assert together["test"] == alone["test"]


def test_an_estimator_can_be_an_ensemble(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(80, 2))
    settings = ["ensemble.seeds=2", "train.global_batch_size=16"]
    classifier = dist_train.Classifier(epochs=2, device="cpu", overrides=settings).fit(features, features[:, 0] > 0)
    classifier.save(tmp_path / "saved")
    again = dist_train.Classifier.load(tmp_path / "saved")
    assert np.array_equal(again.predict_proba(features), classifier.predict_proba(features))
    assert len(classifier.summary_["ensemble"]["members"]) == 2


def test_members_are_a_function_of_the_configuration() -> None:
    config = load_config(["run.seed=5", "ensemble.seeds=2", "run.dir=r", "run.name=n"])
    first, second = members_of(config)
    assert (first.config.run.seed, first.config.data.split_seed) == (5, None)
    assert (second.config.run.seed, second.config.data.split_seed) == (6, 5)
    assert (second.config.run.dir, second.config.run.name) == ("r/n", "seed_1")
    assert members_of(first.config) == members_of(load_config([])) == []
