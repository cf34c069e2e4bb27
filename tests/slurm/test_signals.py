"""Any signal to any process of a job: the run saves and can go on, whoever was told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dist_train.distributed.stopping import STOP_SIGNALS
from tests.pace import SLOW
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import SCRIPT, Training, plain_script, submit, uninterrupted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Word -> where it stands in the command line of a process.
BATCH_SHELL = ("slurm_script", 1)
SRUN = ("srun", 0)
NODE_SHELL = ("slurm/node.sh", 1)
AGENT = ("torch.distributed.run", 2)
RANK = ("launch/train.py", 2)
PLAIN_RANK = ("launch/train.py", 1)


def _tell(stage: Stage, whom: tuple[str, int], name: signal.Signals, *, plain: bool = False, nth: int = 0) -> Training:
    """A job in the middle of training, the `nth` process of a kind in which was sent the signal. It is never requeued.

    `plain`: srun starts two ranks by itself, in a job script without a trap.
    """
    stage = stage.named(name.name)
    never = {"DIST_TRAIN_MAX_RESTARTS": "0"}
    options = ["--nodes=1", "--ntasks-per-node=2"] if plain else ["--nodes=1"]
    script = plain_script(stage) if plain else SCRIPT
    job = submit(stage, sbatch=options, script=script, pace=SLOW, environ=never)
    job.wait_for_step()
    (host,) = job.cluster.nodes_of(job.id)
    word, place = whom
    found = [p for p in job.cluster.hosts.processes(host) if _argument(p, place).endswith(word)]
    os.kill(found[nth], name)
    return job


def _argument(process: int, place: int) -> str:
    arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    return arguments[place] if place < len(arguments) else ""


def _can_go_on(stage: Stage, job: Training) -> None:
    assert job.checkpoints()[-1] > job.slow_from, job.output()
    assert (job.run_dir / "requeue").exists(), job.output()
    assert uninterrupted(stage.table, job.run_dir) == stage.whole


def _saves(stage: Stage, whom: tuple[str, int], names: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
    """Each signal in turn: the run saves, and somebody can go on with it."""
    for name in names:
        job = _tell(stage, whom, name)
        assert job.ended("FAILED")["ExitCode"] == "75:0", job.output()
        _can_go_on(stage, job)


def _saves_without_torchrun(stage: Stage, nth: int) -> None:
    for name in STOP_SIGNALS:
        job = _tell(stage, PLAIN_RANK, name, plain=True, nth=nth)
        assert job.ended("COMPLETED")["ExitCode"] == "0:0", job.output()
        _can_go_on(stage, job)


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


@side_by_side
def test_without_torchrun_to_the_first_rank(stage: Stage) -> None:
    _saves_without_torchrun(stage, 0)


@side_by_side
def test_without_torchrun_to_the_second_rank(stage: Stage) -> None:
    _saves_without_torchrun(stage, 1)


@side_by_side
def test_without_torchrun_to_the_batch_shell(stage: Stage) -> None:
    """It has no trap. It dies, and Slurm then sends TERM to the ranks; INT it leaves to srun, which has not got it."""
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        job = _tell(stage, BATCH_SHELL, name, plain=True)
        assert job.ended("FAILED")["ExitCode"] == f"0:{name}", job.output()
        _can_go_on(stage, job)
    asked = _tell(stage, BATCH_SHELL, signal.SIGINT, plain=True)
    step = asked.step()
    asked.cluster.wait_for(asked.id, lambda _: asked.step() > step, "to train on")
    asked.cluster.command("scancel", asked.id)
