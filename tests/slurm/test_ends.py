"""A job that is to end ends: cancelled, broken, misspelt, refused, or out of attempts; and nothing brings it back."""

from __future__ import annotations

import pytest

from tests.pace import SLOW, Pace
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import preempt, submit, uninterrupted


@side_by_side
def test_a_cancelled_job_has_saved_and_stays_cancelled(stage: Stage) -> None:
    job = submit(stage, pace=SLOW)
    job.wait_for_step()
    stage.cluster.command("scancel", job.id)
    job.ended("CANCELLED")
    reached = job.checkpoints()[-1]
    assert reached > job.slow_from  # it is of the moment of the cancellation, not of the last rhythmic save
    assert (job.run_dir / "requeue").exists()
    assert uninterrupted(stage.table, job.run_dir) == stage.whole


@side_by_side
def test_a_fault_ends_the_job(stage: Stage) -> None:
    job = submit(stage, pace=Pace(crash_at=30))
    job.ended("FAILED")
    assert "a fault in step 30" in job.output()
    assert not (job.run_dir / "requeue").exists()


@side_by_side
def test_a_mistake_in_the_configuration_ends_the_job(stage: Stage) -> None:
    job = submit(stage, "optim.learning_rate=1", sbatch=["--nodes=2"])
    assert job.ended("FAILED")["ExitCode"] == "2:0"
    assert "learning_rate" in job.output()
    assert not job.run_dir.exists()


@pytest.mark.slow  # in the daily suite: tests/resume/test_resume.py::test_another_job_in_the_folder_is_refused
@side_by_side
def test_a_second_job_on_a_run_folder_is_refused_and_told_who_holds_it(stage: Stage) -> None:
    first = submit(stage, pace=SLOW)
    first.wait_for_step()
    (host,) = stage.cluster.nodes_of(first.id)
    second = submit(stage)
    second.ended("FAILED")
    assert f"host {host}" in second.output()
    assert f"job {first.id}" in second.output()
    assert stage.cluster.job(first.id)["JobState"] == "RUNNING"
    stage.cluster.command("scancel", first.id)


@pytest.mark.slow
@side_by_side
def test_a_job_that_has_been_restarted_too_often_is_left_alone(stage: Stage) -> None:
    job = submit(stage, pace=SLOW, environ={"DIST_TRAIN_MAX_RESTARTS": "0"})
    job.wait_for_step()
    stage.cluster.command("scancel", "--batch", "--signal=USR1", job.id)
    assert job.ended("FAILED")["ExitCode"] == "75:0"
    assert (job.run_dir / "requeue").exists()
    assert uninterrupted(stage.table, job.run_dir) == stage.whole


@pytest.mark.slow
@side_by_side
def test_a_preempted_job_that_is_cancelled_while_it_waits_does_not_come_back(stage: Stage) -> None:
    job = submit(stage, pace=SLOW)
    job.wait_for_step()
    with stage.cluster.preempting():
        preempt(job)
        job.wait_for_restart()
    stage.cluster.command("scancel", job.id)
    assert stage.cluster.wait_for_end(job.id)["JobState"] == "CANCELLED"
    assert uninterrupted(stage.table, job.run_dir) == stage.whole
