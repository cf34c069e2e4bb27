"""The default job, killed at random under torchrun: in the middle of an epoch, and in the middle of a save."""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path

import pytest

from tests.commands import REPOSITORY
from tests.resume.jobs import outcome
from tests.resume.processes import job

NUM_KILLS = 20
RANKS = 2
SEED = 2024
PAUSE_SECONDS = 0.002  # after each step of a run that is going to be killed, so that the kill finds it at work

EPOCHS = 3
SAVE_STEPS = 20
FILE_OPERATIONS = 24  # of a save, about; a kill after the last one hits the next save


def _arguments(run_dir: Path) -> list[str]:
    return [
        str(REPOSITORY / "configs" / "credit_risk.yaml"), f"run.dir={run_dir.parent}", f"run.name={run_dir.name}",
        f"train.epochs={EPOCHS}", f"checkpoint.every_steps={SAVE_STEPS}", "log.every_steps=10", "wandb.mode=disabled",
        "runtime.device=cpu",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_random_kills_of_the_default_job_change_no_bit(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    with job(_arguments(tmp_path / "whole"), RANKS, tmp_path / "log") as run:
        assert run.wait() == 0, run.log()
    whole = outcome(tmp_path / "whole")
    last = whole["steps"]
    in_a_save = 0
    for number in range(NUM_KILLS):
        run_dir = tmp_path / f"killed{number}"
        trap = {"save": draw.randint(1, last // SAVE_STEPS - 1), "nth": draw.randint(1, FILE_OPERATIONS), "tear": True}
        step = draw.randint(1, last - 30)
        if number % 2:
            with job(_arguments(run_dir), RANKS, tmp_path / "log", **trap) as run:
                assert run.wait() == -signal.SIGKILL, run.log()
            in_a_save += 1
        else:
            with job(_arguments(run_dir), RANKS, tmp_path / "log", pause=PAUSE_SECONDS) as run:
                run.wait_for_step(step)
                run.kill_all()
        assert not (run_dir / "summary.json").exists()
        found = sorted(path.name for path in (run_dir / "checkpoints").glob("*"))
        with job(_arguments(run_dir), RANKS, tmp_path / "log") as run:
            assert run.wait() == 0, run.log()
        resumed = outcome(run_dir)
        where = json.dumps(trap) if number % 2 else f"step {step}"
        print(f"kill {number + 1}: {where}, left {', '.join(found)}; {resumed['weights_sha256']}")
        assert resumed == whole, (number, where)
    print(f"{NUM_KILLS} kills, {in_a_save} of them in a save; {whole['steps']} steps, {whole['weights_sha256']}")
