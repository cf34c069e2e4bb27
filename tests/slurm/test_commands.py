"""The commands that submit jobs, on a real cluster: what they ask for is what Slurm accepts, and runs."""

from __future__ import annotations

import json
import sys

import pytest

from tests.pace import SLOW
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import Training, arguments, checkout


@side_by_side
def test_submit_checks_and_submits_a_job_that_trains(stage: Stage) -> None:
    submit = (sys.executable, "launch/submit.py", "--nodes=2", "--sbatch=--exclusive")
    log = f"--sbatch=--output={stage.run_dir.parent}/submitted-%j.out"
    job = arguments(stage.table, stage.run_dir)
    assert stage.cluster.command(*submit, log, "--partition=nowhere", *job, check=False) == ""
    number = stage.cluster.command(*submit, log, *job)
    submitted = Training(stage.cluster, number.strip(), stage.run_dir, 0)
    assert submitted.completed(restarts=0) == stage.whole
    assert submitted.summary()["world_size"] == 2


@pytest.mark.slow
@side_by_side
def test_a_pipeline_waits_for_the_real_end_of_each_job(stage: Stage) -> None:
    """Training is stopped and requeued in between: it keeps its number, and evaluation waits on."""
    root = checkout(stage.run_dir)
    run_dir, table = root / "run", root / "made.csv"
    said = stage.cluster.command(
        *("slurm/pipeline.sh", f"--prepare=cp {stage.table} {table}", "--nodes=2", *arguments(table, run_dir)),
        environ={"DIST_TRAIN_VENV": sys.prefix, **SLOW.environment()},
        cwd=root,
    )
    prepares, trains, evaluates = [line.split()[1] for line in said.splitlines()]
    training = Training(stage.cluster, trains, run_dir, SLOW.slow_from)
    training.wait_for_step()
    assert stage.cluster.job(evaluates)["JobState"] == "PENDING"
    stage.cluster.command("scancel", "--batch", "--signal=USR1", trains)
    assert training.completed(restarts=1) == stage.whole
    assert stage.cluster.wait_for_end(evaluates)["JobState"] == "COMPLETED"
    assert stage.cluster.job(prepares)["JobState"] == "COMPLETED"
    (answer,) = (
        line for line in (root / f"slurm-{evaluates}.out").read_text().splitlines() if line.startswith('{"test"')
    )
    assert json.loads(answer)["test"]["loss"] == stage.whole["test"]["loss"]


@pytest.mark.slow
@side_by_side
def test_what_waits_for_a_job_that_failed_is_withdrawn(stage: Stage) -> None:
    root = checkout(stage.run_dir)
    said = stage.cluster.command(
        *("slurm/pipeline.sh", "--prepare=exit 3", *arguments(stage.table, root / "run")),
        environ={"DIST_TRAIN_VENV": sys.prefix},
        cwd=root,
    )
    jobs = [line.split()[1] for line in said.splitlines()]
    states = [stage.cluster.wait_for_end(job)["JobState"] for job in jobs]
    assert states == ["FAILED", "CANCELLED", "CANCELLED"]
    assert not (root / "run").exists()
