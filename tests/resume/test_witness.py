"""witness.jsonl of an interrupted run in the exact mode is that of the run that was never interrupted."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from dist_train.run.checkpoint.state import read_parts
from dist_train.run.checkpoint.witness import read_chain, state_lines
from tests.cli.in_process import command
from tests.resume.jobs import Trap, finish, folder_of, run_job, tiny_job, write_table

EXACT = ("train.virtual_ranks=4", "train.max_steps=24", "checkpoint.keep=9", "evaluation.every_steps=6")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of all runs."""
    return write_table(tmp_path_factory.mktemp("table") / "clients.csv")


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted, on two ranks."""
    arguments = tiny_job(table, tmp_path_factory.mktemp("whole") / "whole", *EXACT)
    finish(arguments, 2)
    return folder_of(arguments)


def witness(run_dir: Path) -> bytes:
    return (run_dir / "witness.jsonl").read_bytes()


def test_every_checkpoint_has_a_line_and_the_model_the_head(whole: Path) -> None:
    chain = read_chain(whole / "witness.jsonl")
    assert chain
    assert [line["step"] for line in chain if "config" in line] == [0]
    steps = sorted(int(path.name[5:]) for path in (whole / "checkpoints").iterdir())
    assert list(state_lines(chain)) == steps
    assert steps[-1] == 24
    assert chain[-1]["metrics_lines"] == len((whole / "metrics.jsonl").read_text().splitlines())
    described = read_parts(whole / "model")["model.json"]
    assert described["witness"] == {"lines": len(chain), "head": chain[-1]["head"]}
    assert described["weights_sha256"] == state_lines(chain)[described["step"]]["weights_sha256"]


def test_no_path_name_or_clock_is_in_it(whole: Path, table: Path) -> None:
    text = witness(whole).decode()
    assert not [word for word in (str(table.parent), whole.name, "samples_per_second", "train_seconds") if word in text]


def _steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_chain(run_dir / "witness.jsonl") or []]


def test_kills_and_stops_leave_it_as_it_would_have_been(table: Path, whole: Path, tmp_path: Path) -> None:
    arguments = tiny_job(table, tmp_path / "run", *EXACT)
    run_dir = folder_of(arguments)
    assert run_job(arguments, 1, Trap(step=8)).killed
    assert run_job(arguments, 2, Trap(step=12, signal=signal.SIGTERM)).codes == [0, 0]
    assert _steps(run_dir)[-1] == 14
    assert run_job(arguments, 4, Trap(step=14)).killed
    assert _steps(run_dir) == [step for step in _steps(whole) if step < 14]
    assert (run_dir / "checkpoints" / "step_00000014").is_dir()
    assert run_job(arguments, 1, Trap(save=1, kind="os.mkdir")).killed  # between a line and its checkpoint
    assert _steps(run_dir) == [step for step in _steps(whole) if step <= 15]
    assert not (run_dir / "checkpoints" / "step_00000015").exists()
    with (run_dir / "witness.jsonl").open("ab") as stream:
        stream.write(b'{"step": 2')  # as a kill leaves a line that is being written
    finish(arguments, 1)
    assert witness(run_dir) == witness(whole)


def test_other_settings_are_a_line_and_what_was_before_stays(table: Path, tmp_path: Path) -> None:
    arguments = tiny_job(table, tmp_path / "run", "train.max_steps=7", "train.virtual_ranks=2")
    finish(arguments)
    before = witness(folder_of(arguments))
    finish([*arguments, "train.max_steps=12", "run.time_limit_minutes=9"])
    chain = read_chain(folder_of(arguments) / "witness.jsonl")
    assert chain
    assert witness(folder_of(arguments)).startswith(before)
    settings = [(line["step"], line["config"]["train"]["max_steps"]) for line in chain if "config" in line]
    assert settings == [(0, 7), (7, 12)]


def test_a_run_that_had_none_gets_one_from_where_it_goes_on(table: Path, tmp_path: Path) -> None:
    arguments = tiny_job(table, tmp_path / "run", "train.virtual_ranks=2", "train.max_steps=16")
    assert run_job(arguments, 1, Trap(step=7)).killed
    run_dir = folder_of(arguments)
    (run_dir / "witness.jsonl").unlink()
    finish(arguments)
    chain = read_chain(run_dir / "witness.jsonl")
    assert chain
    saved = 7  # the end of an epoch, with the best validation so far
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert chain[0]["metrics_lines"] == sum(line["step"] <= saved for line in lines)
    assert [line["step"] for line in chain][:2] == [saved, 10]
    assert command("verify", run_dir).code == 0
