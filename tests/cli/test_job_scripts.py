"""The job scripts without a cluster: what they decide, with stand-ins for srun, squeue and scontrol."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import commands
from tests.patience import PATIENCE_SECONDS, wait_until

CONFIG = "configs/credit_risk.yaml"
SCRIPTS = sorted(path for path in (commands.REPOSITORY / "slurm").iterdir() if path.suffix in (".sbatch", ".sh"))

RUNNING = "RUNNING 0 N/A"
MARKER = 'mkdir -p "$RUN" && echo \'{"step": 3, "job": "12.0"}\' >"$RUN/requeue"'


@dataclass
class Stage:
    """A folder with stand-ins, and the environment that Slurm would set."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def stand_in(self, name: str, text: str) -> None:
        """A program that notes its arguments and then does what the shell text says."""
        program = self.folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/bash\necho "$@" >>{self.folder}/{name}.asked\n{text}\n')
        program.chmod(0o755)

    def asked(self, name: str) -> list[str]:
        """The arguments of each call of a stand-in."""
        notes = self.folder / f"{name}.asked"
        return notes.read_text().splitlines() if notes.exists() else []

    def start(self, script: str, *arguments: object, **more: str) -> subprocess.Popen[str]:
        """Start `bash slurm/SCRIPT ...` in the repository."""
        environ = commands.environment(
            SLURM_JOB_ID="12",
            SLURM_JOB_NUM_NODES="1",
            SLURM_JOB_NODELIST="node1",
            SLURM_STEP_NUM_NODES="1",
            SLURM_NODEID="0",
            SLURMD_NODENAME="node1",
            DIST_TRAIN_VENV=sys.prefix,
            RUN=str(self.folder / "runs" / "credit_risk"),
        )
        del environ["OMP_NUM_THREADS"]
        return subprocess.Popen(
            ["bash", f"slurm/{script}", *map(str, arguments)],
            cwd=commands.REPOSITORY,
            env=environ | self.environ | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell cannot trap a signal that is ignored when it starts, as SIGINT is of tests in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def train(self, *arguments: object, script: str = "train.sbatch", **more: str) -> tuple[int, str]:
        """Exit code and last line of a training job."""
        job = self.start(script, CONFIG, f"run.dir={self.folder / 'runs'}", *arguments, **more)
        said, _ = job.communicate(timeout=PATIENCE_SECONDS)
        return job.returncode, said.splitlines()[-1]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path)
    stage.stand_in("srun", "true")
    stage.stand_in("squeue", f"echo {RUNNING}")
    stage.stand_in("scontrol", "true")
    return stage


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_is_a_script(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_the_array_is_submitted_as_a_single_job_is() -> None:
    def options(name: str) -> list[str]:
        lines = (commands.REPOSITORY / "slurm" / name).read_text().splitlines()
        return [line for line in lines if line.startswith("#SBATCH") and "--output" not in line]

    assert options("array.sbatch") == options("train.sbatch")


def test_a_run_that_ends_well(stage: Stage) -> None:
    code, last = stage.train()
    assert code == 0
    assert last.endswith("job 12, start 1: finished")
    assert not stage.asked("scontrol")
    (srun,) = stage.asked("srun")
    assert f"slurm/node.sh {stage.folder}/runs/credit_risk " in srun
    assert ":20012 " in srun


@pytest.mark.parametrize("queue", [RUNNING, "RUNNING 0 2026-11-24T13:51:03"])
def test_a_stopped_run_is_requeued(queue: str, stage: Stage) -> None:
    stage.stand_in("srun", MARKER)
    stage.stand_in("squeue", f"echo {queue}")
    code, last = stage.train()
    assert (code, stage.asked("scontrol")) == (0, ["requeue 12"])
    assert last.endswith("stopped and saved; requeued")


def test_a_preempted_run_that_could_not_save_is_requeued(stage: Stage) -> None:
    stage.stand_in("srun", "exit 143")
    stage.stand_in("squeue", "echo RUNNING 0 2026-11-24T13:51:03")
    code, last = stage.train()
    assert (code, stage.asked("scontrol")) == (0, ["requeue 12"])
    assert last.endswith("preempted (exit code 143); requeued")


def test_one_element_of_an_array_is_requeued_and_not_the_whole(stage: Stage) -> None:
    stage.stand_in("srun", f'RUN+=-seed3; {MARKER}; echo "$@" >"{stage.folder}/srun.last"')
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    code, last = stage.train(script="array.sbatch", **array)
    assert (code, stage.asked("scontrol")) == (0, ["requeue 12_3"])
    assert "--jobs=12_3" in stage.asked("squeue")[0]
    assert (stage.folder / "srun.last").read_text().endswith("run.name='credit_risk-seed3' run.seed=3\n")
    assert "job 12_3" in last


@pytest.mark.parametrize(
    ("does", "queue", "environ", "code", "why"),
    [
        (MARKER, "COMPLETING 0 N/A", {}, 75, "Slurm has ended the job (COMPLETING)"),
        (MARKER, "COMPLETING 1 N/A", {}, 75, "Slurm requeues the job by itself"),
        (MARKER, RUNNING, {"DIST_TRAIN_MAX_RESTARTS": "0"}, 75, "DIST_TRAIN_MAX_RESTARTS=0"),
        (MARKER, "RUNNING 1 N/A", {"SLURM_RESTART_COUNT": "1"}, 1, "nothing has told the run to stop"),
        ("exit 1", RUNNING, {}, 1, "nothing has told the run to stop"),
        ("exit 1", "COMPLETING 0 2026-11-24T13:51:03", {}, 1, "Slurm has ended the job"),
    ],
    ids=["cancelled", "left to Slurm", "no restarts left", "marker of another start", "a fault", "cancelled early"],
)
def test_any_other_end_stays_the_end(
    does: str, queue: str, environ: dict[str, str], code: int, why: str, stage: Stage
) -> None:
    stage.stand_in("srun", f"{does}; exit {0 if code == 75 else 1}")
    stage.stand_in("squeue", f"echo {queue}")
    found, last = stage.train(**environ)
    assert (found, stage.asked("scontrol")) == (code, [])
    assert why in last


def test_a_requeue_that_slurm_refuses_is_told(stage: Stage) -> None:
    stage.stand_in("srun", MARKER)
    stage.stand_in("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    code, last = stage.train()
    assert code == 75
    assert last.endswith("stopped and saved; not requeued: Requested operation is presently disabled")


@pytest.mark.parametrize(
    ("arguments", "environ", "culprit"),
    [
        (["optim.lrr=1"], {}, "optim.lrr"),
        ([], {"DIST_TRAIN_VENV": "no where"}, "no where/bin/python"),
        ([], {"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two"),
        ([], {"DIST_TRAIN_MAX_RESTARTS": "-1"}, "DIST_TRAIN_MAX_RESTARTS=-1"),
    ],
)
def test_a_mistake_is_told_before_a_node_is_set_to_work(
    arguments: list[str], environ: dict[str, str], culprit: str, stage: Stage
) -> None:
    code, last = stage.train(*arguments, **environ)
    assert code == 2
    assert last.startswith("error: ")
    assert culprit in last
    assert not stage.asked("srun")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP])
def test_a_signal_becomes_the_stop_file_and_the_job_waits_for_the_save(number: int, stage: Stage) -> None:
    stage.stand_in(
        "srun", f'until [ -s "$RUN/stop" ]; do sleep 0.05; done; cp "$RUN/stop" "$RUN/seen"; {MARKER}; exit 7'
    )
    job = stage.start("train.sbatch", CONFIG, f"run.dir={stage.folder / 'runs'}")
    wait_until(lambda: stage.asked("srun"), "srun")
    job.send_signal(number)
    said, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert (stage.folder / "runs/credit_risk/seen").read_text() == "12.0\n"
    assert stage.asked("scontrol") == ["requeue 12"], said


def pipeline(stage: Stage, *arguments: object) -> tuple[int, list[str]]:
    """Exit code of pipeline.sh and its lines; each job that it submits has the next number, from 1."""
    stage.stand_in(
        "sbatch", f'asked={stage.folder}/sbatch.asked; cat >"{stage.folder}/job$(wc -l <"$asked")"; wc -l <"$asked"'
    )
    asked = stage.start("pipeline.sh", *arguments)
    said, _ = asked.communicate(timeout=PATIENCE_SECONDS)
    return asked.returncode, said.splitlines()


def test_the_jobs_of_a_pipeline_wait_for_one_another(stage: Stage) -> None:
    job = (CONFIG, f"run.dir={stage.folder / 'my runs'}")
    code, said = pipeline(stage, "--prepare=echo 'a b' >c", "--nodes=2", "--dependency=afterany:9", *job)
    assert code == 0, said
    assert [line.split(",")[0] for line in said] == [
        "job 1 prepares the data",
        f"job 2 trains {stage.folder}/my runs/credit_risk",
        "job 3 evaluates it",
    ]
    prepares, trains, evaluates = stage.asked("sbatch")
    assert prepares.startswith("--parsable --dependency=afterany:9 --job-name=prepare ")
    assert trains.startswith(
        "--parsable --dependency=afterok:1 --kill-on-invalid-dep=yes --nodes=2 slurm/train.sbatch "
    )
    assert evaluates.startswith("--parsable --dependency=afterok:2 --kill-on-invalid-dep=yes --job-name=evaluate ")
    subprocess.run(["bash", stage.folder / "job1"], cwd=stage.folder, check=True)
    assert (stage.folder / "c").read_text() == "a b\n"
    assert shlex.split((stage.folder / "job3").read_text().splitlines()[1]) == [
        *("exec", f"{sys.prefix}/bin/python", "launch/evaluate.py", f"{stage.folder}/my runs/credit_risk")
    ]


def test_a_pipeline_with_a_mistake_submits_nothing(stage: Stage) -> None:
    code, said = pipeline(stage, CONFIG, "optim.lrr=1")
    assert (code, stage.asked("sbatch")) == (2, [])
    assert "optim.lrr" in said[-1]


AGENT = 'echo "threads $OMP_NUM_THREADS, $PET_SIGNALS_TO_HANDLE"; echo last words >&2; exit 3'


def node(stage: Stage, text: str, **environ: str) -> subprocess.Popen[str]:
    """node.sh with a stand-in for Python."""
    stage.stand_in("python", text)
    log = stage.folder / "the log-%N.out"
    run = stage.folder / "runs" / "a run"
    return stage.start("node.sh", run, "node1:20012", log, "a b.yaml", DIST_TRAIN_VENV=str(stage.folder), **environ)


@pytest.mark.parametrize(
    ("environ", "ranks", "threads"),
    [
        ({}, 1, 1),
        ({"SLURM_CPUS_ON_NODE": "8"}, 1, 8),
        ({"SLURM_GPUS_ON_NODE": "3", "SLURM_CPUS_ON_NODE": "64", "SLURM_CPUS_PER_TASK": "8"}, 3, 2),
        ({"SLURM_GPUS_ON_NODE": "4", "NPROC_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "1"}, 2, 1),
        ({"NPROC_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "8", "OMP_NUM_THREADS": "3"}, 2, 3),
    ],
)
def test_a_node_starts_its_ranks(environ: dict[str, str], ranks: int, threads: int, stage: Stage) -> None:
    job = node(stage, AGENT, **environ)
    said, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 3
    assert said.startswith(f"threads {threads}, ")
    assert "SIGUSR1" in said
    assert said.endswith("last words\n")
    assert (stage.folder / "the log-node1.out").read_text() == said
    (asked,) = stage.asked("python")
    assert f"--nproc-per-node={ranks} " in asked
    assert asked.endswith("--rdzv-id=12.0 launch/train.py a b.yaml")


def test_a_node_that_is_told_twice_tells_the_run_and_leaves_torchrun_alone(stage: Stage) -> None:
    stop = stage.folder / "runs" / "a run" / "stop"
    job = node(
        stage, f'trap "exit 99" TERM; echo ready; until [ -s "{stop}" ]; do sleep 0.05; done; sleep 1; echo saved'
    )
    wait_until(lambda: stage.asked("python"), "python")
    time.sleep(0.2)
    for _ in range(2):
        job.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    said, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 0, said
    assert said.endswith("saved\n")
    assert said.count("got SIGTERM") == 1
    assert stop.read_text() == "12.0\n"
