"""`model/` is enough: copied elsewhere, it predicts as its run folder does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.in_process import command
from tests.resume.jobs import finish, tiny_job, write_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    arguments = tiny_job(write_table(folder / "clients.csv"), folder / "run", "train.epochs=2", "model.embedding_dim=3")
    finish(arguments)
    return folder / "run"


@pytest.fixture
def alone(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "model", tmp_path / "registry" / "model"))


def test_a_copy_of_the_model_predicts_and_is_evaluated_as_the_run_is(run: Path, alone: Path, tmp_path: Path) -> None:
    table = run.parent / "clients.csv"
    for source, name in ((run, "of_run.csv"), (alone, "of_model.csv")):
        seen = command("predict", source, table, tmp_path / name)
        assert seen.code == 0, seen.err
    assert (tmp_path / "of_run.csv").read_bytes() == (tmp_path / "of_model.csv").read_bytes()
    answers = [command("evaluate", source, "--data", table) for source in (run, alone)]
    assert [seen.code for seen in answers] == [0, 0], answers
    assert answers[0].out == answers[1].out


def test_what_a_model_alone_does_not_have_is_refused(alone: Path) -> None:
    seen = command("evaluate", alone)
    assert seen.code == 2
    assert "has no data of its own: give a table (--data FILE)" in seen.err
    seen = command("evaluate", alone, "--checkpoint", "last")
    assert seen.code == 2
    assert "is a trained model, without checkpoints beside it" in seen.err


def test_the_description_names_the_architecture_and_no_path(run: Path) -> None:
    text = (run / "model" / "model.json").read_text()
    description = json.loads(text)
    assert description["format"] == 2
    assert sorted(description["classes"]) == ["high", "low", "middle"]
    assert description["config"]["model"]["embedding_dim"] == 3
    assert description["config"]["train"] == {"precision": "float32"}
    assert str(run.parent) not in text
    summary = json.loads((run / "summary.json").read_text())
    assert description["weights_sha256"] == summary["weights_sha256"]


def test_the_architecture_is_that_of_the_model_and_not_of_config_yaml(run: Path, tmp_path: Path) -> None:
    """A later start of the run may have rewritten config.yaml."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = (copy / "config.yaml").read_text()
    assert "hidden_dim: 16" in config
    (copy / "config.yaml").write_text(config.replace("hidden_dim: 16", "hidden_dim: 8"))
    for checkpoint in ("best", "last"):
        assert command("evaluate", copy, "--checkpoint", checkpoint).code == 0
