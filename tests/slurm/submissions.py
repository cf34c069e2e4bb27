"""Small training jobs for the cluster: the project's own job scripts, unmodified, at a pace that tests can follow."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.commands import REPOSITORY
from tests.pace import AS_IT_COMES, Pace
from tests.resume.jobs import finish, outcome, tiny_job
from tests.slurm.cluster import Cluster, Job
from tests.slurm.stories import Stage

SCRIPT = "slurm/train.sbatch"
STEPS = 60

# Processes of the tests themselves have a minute: they shall not wait for one another.
ONE_AT_A_TIME = threading.Lock()

# The same bits on any number of ranks, so that every job has one answer, on whatever nodes it ended.
SETTINGS = (
    "train.virtual_ranks=4",
    f"train.max_steps={STEPS}",
    "train.epochs=100",
    "train.early_stopping_patience=null",
    "checkpoint.every_steps=40",
    "log.every_steps=5",
    "runtime.timeout_seconds=60",
)


@dataclass(frozen=True)
class Training:
    """A submitted training job."""

    cluster: Cluster
    id: str
    run_dir: Path
    slow_from: int

    def summary(self) -> dict[str, Any]:
        """The job's summary.json."""
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary

    def output(self) -> str:
        """What the job has printed in all its attempts."""
        path = Path(self.cluster.job(self.id)["StdOut"])
        return path.read_text(errors="replace") if path.is_file() else ""

    def step(self) -> int:
        """The last step in metrics.jsonl; 0 when there is none."""
        try:
            return int(json.loads((self.run_dir / "metrics.jsonl").read_bytes().splitlines()[-1])["step"])
        except (OSError, ValueError, IndexError):
            return 0

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints."""
        return sorted(int(path.name[5:]) for path in (self.run_dir / "checkpoints").glob("step_*"))

    def wandb_runs(self) -> set[str]:
        """The wandb runs that all attempts together have written."""
        return {path.name.rpartition("-")[2] for path in (self.run_dir / "wandb").glob("offline-run-*")}

    def wait_for_step(self) -> None:
        """Wait until the job is where it trains slowly."""
        step = self.slow_from + 1
        self.cluster.wait_for(self.id, lambda _: self.step() >= step, f"to train step {step}")

    def wait_for_output(self, text: str) -> None:
        """Wait until the job has printed that."""
        self.cluster.wait_for(self.id, lambda _: text in self.output(), f"to print {text!r}")

    def minutes(self) -> int:
        """How long the job has run."""
        hours, minutes, _ = self.cluster.job(self.id)["RunTime"].split(":")
        return int(hours) * 60 + int(minutes)

    def set_time_limit(self, minutes: int) -> None:
        """Change the job's time limit."""
        self.cluster.command("scontrol", "update", f"jobid={self.id}", f"timelimit={minutes}")

    def wait_for_restart(self) -> Job:
        """Wait until the job waits for another attempt, or runs it."""
        return self.cluster.wait_for(self.id, lambda known: known["Restarts"] != "0", "to be requeued")

    def ended(self, state: str) -> Job:
        """Wait for the end, which must be this one, in the first attempt."""
        known = self.cluster.wait_for_end(self.id)
        assert (known["JobState"], known["Restarts"]) == (state, "0"), f"{known}{self.cluster.logs(self.id)}"
        return known

    def completed(self, *, restarts: int) -> dict[str, Any]:
        """Wait for the end, which must be a good one after that many restarts; what was trained."""
        known = self.cluster.wait_for_end(self.id)
        story = f"{known}{self.cluster.logs(self.id)}"
        assert known["JobState"] == "COMPLETED", story
        assert known["ExitCode"] == "0:0", story
        assert int(known["Restarts"]) == restarts, story
        assert not (self.run_dir / "requeue").exists()
        return outcome(self.run_dir)


def arguments(table: Path, run_dir: Path, *more: str) -> list[str]:
    """Configuration of a job, as it is typed after the script."""
    return tiny_job(table, run_dir, *SETTINGS, *more)


def submit(
    stage: Stage,
    *more: str,
    sbatch: Sequence[str] = ("--nodes=1",),
    script: str = SCRIPT,
    pace: Pace = AS_IT_COMES,
    environ: Mapping[str, str] | None = None,
) -> Training:
    """`sbatch OPTIONS slurm/train.sbatch ...` from the repository root, with whole nodes for the job."""
    stage.run_dir.parent.mkdir(parents=True, exist_ok=True)
    options = ["--parsable", "--exclusive", f"--output={stage.run_dir}-%j.out", *sbatch]
    job = stage.cluster.command(
        *("sbatch", *options, script, *arguments(stage.table, stage.run_dir, *more)),
        environ={"DIST_TRAIN_VENV": sys.prefix, **pace.environment(), **(environ or {})},
    )
    return Training(stage.cluster, job.strip(), stage.run_dir, pace.slow_from)


def plain_script(stage: Stage) -> str:
    """A job script of a user's own: srun starts the ranks, without torchrun."""
    stage.run_dir.parent.mkdir(parents=True, exist_ok=True)
    script = stage.run_dir.with_name(f"{stage.run_dir.name}.sbatch")
    script.write_text('#!/usr/bin/env bash\nsrun "$DIST_TRAIN_VENV/bin/python" launch/train.py "$@"\n')
    return str(script)


def checkout(folder: Path) -> Path:
    """A root of the repository, for commands that write into it."""
    folder.mkdir(parents=True)
    for name in ("configs", "dist_train", "launch", "slurm"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def uninterrupted(table: Path, run_dir: Path, *more: str) -> dict[str, Any]:
    """What one plain process makes of the job, or of what is left to do of it."""
    with ONE_AT_A_TIME:
        return finish(arguments(table, run_dir, *more))


def preempt(victim: Training) -> None:
    """A job of the higher partition takes the victim's nodes for a moment."""
    nodes = ",".join(victim.cluster.nodes_of(victim.id))
    options = ["--partition=high", "--exclusive", f"--nodelist={nodes}", "--output=/dev/null", "--wrap=sleep 1"]
    victim.cluster.command("sbatch", *options)
