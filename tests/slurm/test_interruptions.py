"""Whatever stops a job on a cluster, it goes on by itself and ends with the bits of the run that nobody interrupted.

Nor is a line of its metrics doubled or missing, and wandb sees one run.
"""

from __future__ import annotations

import time

import pytest

from tests.pace import SLOW, Pace
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import preempt, submit

WANDB = "wandb.mode=offline"


@pytest.mark.slow
@side_by_side
def test_a_warning_of_the_time_limit(stage: Stage) -> None:
    """Two minutes before the limit, as the script asks, Slurm sends USR1."""
    job = submit(stage, WANDB, sbatch=["--nodes=2"], pace=SLOW)
    job.wait_for_step()
    # Slurm looks twice a minute, and reckons in whole minutes: one to two of them are left.
    job.set_time_limit(minutes=job.minutes() + 2)
    job.wait_for_restart()
    job.set_time_limit(minutes=60)
    assert "got SIGUSR1" in job.output()
    assert job.completed(restarts=1) == stage.whole
    assert len(list((job.run_dir / "wandb").glob("offline-run-*"))) == 2
    assert len(job.wandb_runs()) == 1


@side_by_side
def test_preemption(stage: Stage) -> None:
    """A job of a higher partition takes the nodes: Slurm sends TERM."""
    job = submit(stage, WANDB, pace=SLOW)
    job.wait_for_step()
    with stage.cluster.preempting():
        preempt(job)
        job.wait_for_restart()
    assert job.completed(restarts=1) == stage.whole
    assert len(job.wandb_runs()) == 1


@pytest.mark.slow
@side_by_side
def test_preemption_while_importing(stage: Stage) -> None:
    """TERM comes before Python has come to a line of ours."""
    job = submit(stage, WANDB, pace=Pace(import_seconds=15))
    job.wait_for_output("importing")
    with stage.cluster.preempting():
        preempt(job)
        job.wait_for_restart()
    assert job.completed(restarts=1) == stage.whole
    assert len(job.wandb_runs()) == 1


@pytest.mark.slow
@side_by_side
def test_preemption_with_the_users_signal(stage: Stage) -> None:
    """A cluster with `preempt_send_user_signal` sends the signal of --signal in TERM's place."""
    job = submit(stage, WANDB, pace=SLOW)
    job.wait_for_step()
    with stage.cluster.preempting(user_signal=True):
        preempt(job)
        job.wait_for_restart()
    assert "got SIGUSR1" in job.output()
    assert job.completed(restarts=1) == stage.whole
    assert len(job.wandb_runs()) == 1


@pytest.mark.slow
@side_by_side
def test_a_requeue_by_hand(stage: Stage) -> None:
    """`scontrol requeue` gives the job KillWait seconds."""
    job = submit(stage, WANDB, pace=SLOW)
    job.wait_for_step()
    stage.cluster.command("scontrol", "requeue", job.id)
    assert job.completed(restarts=1) == stage.whole
    assert len(job.wandb_runs()) == 1


@side_by_side
def test_the_loss_of_the_second_node(stage: Stage) -> None:
    """Nobody is told; Slurm gives the node up, and the job goes on with the node that is left."""
    cluster = stage.cluster
    job = submit(stage, WANDB, sbatch=["--nodes=1-2", "--partition=island"], pace=SLOW)
    job.wait_for_step()
    first, second = cluster.nodes_of(job.id)
    cluster.hosts.split_evenly(second)
    try:
        assert job.completed(restarts=1) == stage.whole
        assert cluster.job(job.id)["NodeList"] == first
        assert job.summary()["world_size"] == 1
        assert len(job.wandb_runs()) == 1
    finally:
        cluster.restore(second)


@pytest.mark.slow
@side_by_side
def test_the_loss_of_the_first_node(stage: Stage) -> None:
    """The node of the batch script and of rank 0, which both live on out there until the timeout."""
    cluster = stage.cluster
    job = submit(stage, WANDB, sbatch=["--nodes=1-2", "--partition=islet"], pace=SLOW)
    job.wait_for_step()
    first, second = cluster.nodes_of(job.id)
    cluster.hosts.split_evenly(first)
    try:
        assert job.completed(restarts=1) == stage.whole
        assert cluster.job(job.id)["NodeList"] == second
        assert job.summary()["world_size"] == 1
        assert len(job.wandb_runs()) == 1
    finally:
        cluster.restore(first)


@pytest.mark.slow
@side_by_side
def test_a_job_that_is_suspended_for_longer_than_the_timeout(stage: Stage) -> None:
    """`scontrol suspend` stops every process of a job on all nodes; `resume` continues them."""
    job = submit(stage, "runtime.timeout_seconds=20", sbatch=["--nodes=2"], pace=Pace(step_seconds=0.5))
    job.wait_for_step()
    stage.cluster.command("scontrol", "suspend", job.id)
    time.sleep(5)  # it takes the nodes a moment
    step = job.step()
    time.sleep(35)
    assert job.step() == step
    stage.cluster.command("scontrol", "resume", job.id)
    assert job.completed(restarts=0) == stage.whole
    assert job.output().count("suspended for") == 1, job.output()
