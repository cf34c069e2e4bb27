"""Any signal to any process of a job: the run saves and can go on, whoever was told."""

from __future__ import annotations

import os
import signal

import pytest

from dist_train.runtime.stopping import STOP_SIGNALS
from tests.pace import SLOW
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import Training, submit, uninterrupted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NEVER_REQUEUED = {"DIST_TRAIN_MAX_RESTARTS": "0"}


def _every_signal(stage: Stage, whom: str) -> None:
    """A job for each signal, which goes to the first process of the job's host whose words contain `whom`."""
    jobs = {
        name: submit(stage.named(name.name), sbatch=["--nodes=1"], pace=SLOW, environ=NEVER_REQUEUED)
        for name in STOP_SIGNALS
    }
    for name, job in jobs.items():
        job.wait_for_step()
        (host,) = job.cluster.nodes_of(job.id)
        os.kill(job.cluster.hosts.processes(host, whom)[0], name)
    for job in jobs.values():
        assert job.ended("FAILED")["ExitCode"] == "75:0", job.output()  # saved, and left for somebody to go on
        _is_saved(stage, job)


def _is_saved(stage: Stage, job: Training) -> None:
    assert job.checkpoints()[-1] > job.slow_from, job.output()
    assert (job.run_dir / "requeue").exists(), job.output()
    assert uninterrupted(stage.table, job.run_dir) == stage.whole


@side_by_side
def test_to_the_batch_shell(stage: Stage) -> None:
    _every_signal(stage, "slurm_script")


@side_by_side
def test_to_the_shell_of_a_node(stage: Stage) -> None:
    _every_signal(stage, "\0slurm/node.sh\0")


@side_by_side
def test_to_the_agent(stage: Stage) -> None:
    _every_signal(stage, "\0torch.distributed.run\0")


@side_by_side
def test_to_a_rank(stage: Stage) -> None:
    _every_signal(stage, "\0TORCHELASTIC_RUN_ID=")


@side_by_side
def test_to_srun(stage: Stage) -> None:
    """srun hands signals on; a single INT it keeps for itself and reports, so there the job trains on."""
    jobs = {
        name: submit(stage.named(name.name), sbatch=["--nodes=1"], pace=SLOW, environ=NEVER_REQUEUED)
        for name in STOP_SIGNALS
    }
    for name, job in jobs.items():
        job.wait_for_step()
        (host,) = job.cluster.nodes_of(job.id)
        os.kill(job.cluster.hosts.processes(host, "srun\0")[0], name)
    interrupted = jobs.pop(signal.SIGINT)
    for job in jobs.values():
        job.ended("FAILED")
        _is_saved(stage, job)
    assert interrupted.cluster.job(interrupted.id)["JobState"] == "RUNNING"
    interrupted.cluster.command("scancel", interrupted.id)
