"""Any signal to any process of a job: the run saves and can go on, whoever was told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dist_train.runtime.stopping import STOP_SIGNALS
from tests.pace import SLOW
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import Training, submit, uninterrupted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Word -> where it stands in the command line of a process.
BATCH_SHELL = ("slurm_script", 1)
SRUN = ("srun", 0)
NODE_SHELL = ("slurm/node.sh", 1)
AGENT = ("torch.distributed.run", 2)
RANK = ("launch/train.py", 2)


def _tell(stage: Stage, whom: tuple[str, int], name: signal.Signals) -> Training:
    """A job in the middle of training, one process of which was sent the signal. It is never requeued."""
    never = {"DIST_TRAIN_MAX_RESTARTS": "0"}
    job = submit(stage.named(name.name), sbatch=["--nodes=1"], pace=SLOW, environ=never)
    job.wait_for_step()
    (host,) = job.cluster.nodes_of(job.id)
    word, place = whom
    found = [p for p in job.cluster.hosts.processes(host) if _argument(p, place).endswith(word)]
    os.kill(found[0], name)
    return job


def _argument(process: int, place: int) -> str:
    arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    return arguments[place] if place < len(arguments) else ""


def _saves(stage: Stage, whom: tuple[str, int], names: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
    """Each signal in turn: the run saves, and somebody can go on with it."""
    for name in names:
        job = _tell(stage, whom, name)
        assert job.ended("FAILED")["ExitCode"] == "75:0", job.output()
        assert job.checkpoints()[-1] > job.slow_from, job.output()
        assert (job.run_dir / "requeue").exists(), job.output()
        assert uninterrupted(stage.table, job.run_dir) == stage.whole


@side_by_side
def test_to_the_batch_shell(stage: Stage) -> None:
    _saves(stage, BATCH_SHELL)


@side_by_side
def test_to_the_shell_of_a_node(stage: Stage) -> None:
    _saves(stage, NODE_SHELL)


@side_by_side
def test_to_the_agent(stage: Stage) -> None:
    _saves(stage, AGENT)


@side_by_side
def test_to_a_rank(stage: Stage) -> None:
    _saves(stage, RANK)


@side_by_side
def test_to_srun(stage: Stage) -> None:
    """srun hands on what a user may mean by USR1 and USR2. The others it takes for itself (Slurm 22.05)."""
    _saves(stage, SRUN, (signal.SIGUSR1, signal.SIGUSR2))

    # One INT is a question: srun prints how its tasks are, and they train on.
    asked = _tell(stage, SRUN, signal.SIGINT)
    asked.wait_for_output("one more within 1 sec to abort")
    step = asked.step()
    asked.cluster.wait_for(asked.id, lambda _: asked.step() > step, "to train on")
    asked.cluster.command("scancel", asked.id)

    # TERM: srun has its tasks killed at once. Nobody below hears of it, so what is left is the last checkpoint.
    killed = _tell(stage, SRUN, signal.SIGTERM)
    assert killed.ended("FAILED")["ExitCode"] == "137:0", killed.output()
    assert not (killed.run_dir / "requeue").exists()
    assert uninterrupted(stage.table, killed.run_dir) == stage.whole
