"""`launch/submit.py`: the script it writes, to the letter, and what sbatch is asked. sbatch is a stand-in."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import commands
from tests.cli.in_process import CommandResult, command, contents
from tests.cli.test_mistakes import assert_one_message
from tests.patience import PATIENCE_SECONDS

CONFIG = "configs/credit_risk.yaml"

TRAINING = f"""\
#!/usr/bin/env bash
#SBATCH --job-name=credit_risk
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
#SBATCH --reservation=friday
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#SBATCH --signal=B:USR1@120
#SBATCH --chdir={commands.REPOSITORY}

module load cuda/12.6
export DIST_TRAIN_VENV={sys.prefix}
export NPROC_PER_NODE=4
. slurm/train.sbatch configs/credit_risk.yaml optim.lr=3e-4
"""

SEEDS = f"""\
#!/usr/bin/env bash
#SBATCH --job-name=credit_risk
#SBATCH --array=0-3
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
#SBATCH --signal=B:USR1@120
#SBATCH --chdir={commands.REPOSITORY}

export DIST_TRAIN_VENV={sys.prefix}
. slurm/array.sbatch configs/credit_risk.yaml
"""


@dataclass(frozen=True)
class Sbatch:
    """A stand-in on the PATH. It notes what it is given, and refuses what says `refuse`."""

    folder: Path

    @property
    def path(self) -> str:
        return f"{self.folder}:/usr/bin:/bin"

    @property
    def asked(self) -> list[str]:
        """The options of each call."""
        notes = self.folder / "asked"
        return notes.read_text().splitlines() if notes.exists() else []

    def script(self) -> str:
        """The script that was handed in last."""
        return (self.folder / "script").read_text()


@pytest.fixture
def sbatch(tmp_path: Path) -> Sbatch:
    folder = tmp_path / "the bin"
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text(
        '#!/bin/sh\ncd "$(dirname "$0")" && echo "$@" >>asked && cat >script\n'
        "grep -q refuse script && { echo 'sbatch: error: no such partition' >&2; exit 1; }\n"
        'case "$1" in --test-only) echo "sbatch: Job 6 to start at noon" >&2 ;; *) echo "7;cluster" ;; esac\n'
    )
    program.chmod(0o755)
    return Sbatch(folder)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(commands.REPOSITORY)


def printed(*arguments: object) -> str:
    """What `--print` prints; nothing else is said, and no sbatch is there to be asked."""
    outcome = command("submit", *arguments, "--print", PATH="")
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def test_the_script_to_the_letter() -> None:
    options = ["--nodes=2", "--gpus-per-node=8", "--time=4:00:00", "--ranks=4", "--line=module load cuda/12.6"]
    assert printed(*options, "--sbatch=--reservation=friday", CONFIG, "optim.lr=3e-4") == TRAINING


def test_seeds_are_an_array() -> None:
    assert printed("--seeds=0-3", CONFIG) == SEEDS


def test_a_given_option_replaces_the_standing_one() -> None:
    script = printed("--sbatch=--signal=B:USR1@600", "--sbatch=--no-requeue", CONFIG)
    assert script.count("--signal") == 1
    assert "#SBATCH --signal=B:USR1@600\n" in script


def test_what_is_not_plain_reaches_sbatch_and_the_run_as_it_is() -> None:
    odd = "run.name=a 'b' \"c\" $HOME"
    script = printed('--sbatch=--comment=it\'s "so" \\', CONFIG, odd)
    assert '#SBATCH --comment="it\'s \\"so\\" \\\\"\n' in script
    assert '#SBATCH --job-name="a \'b\' \\"c\\" $HOME"\n' in script
    assert shlex.split(script.splitlines()[-1]) == [".", "slurm/train.sbatch", CONFIG, odd]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_it_is_checked_then_submitted(sbatch: Sbatch) -> None:
    outcome = command("submit", "--nodes=2", CONFIG, PATH=sbatch.path)
    assert outcome == CommandResult(0, "7\n", "job 7 trains runs/credit_risk\n")
    assert sbatch.asked == ["--test-only", "--parsable"]
    assert sbatch.script() == printed("--nodes=2", CONFIG)


def test_a_refused_job_is_not_submitted(sbatch: Sbatch) -> None:
    outcome = command("submit", "--partition=refuse", CONFIG, PATH=sbatch.path)
    assert_one_message(outcome, "sbatch refuses the job", "no such partition")
    assert sbatch.asked == ["--test-only"]


def test_a_sweep_is_checked_line_by_line(sbatch: Sbatch, tmp_path: Path) -> None:
    sweep = tmp_path / "my sweep.txt"
    sweep.write_text("optim.lr=1e-3\noptim.lr=2e-3 model.dropout='[0.1, 0.1]'\n")
    outcome = command("submit", f"--sweep={sweep}", CONFIG, PATH=sbatch.path)
    assert outcome == CommandResult(0, "7\n", "job 7 trains runs/credit_risk-*\n")
    assert "#SBATCH --array=1-2\n" in sbatch.script()
    assert shlex.split(sbatch.script().splitlines()[-1]) == [".", "slurm/array.sbatch", str(sweep), CONFIG]
    for line, culprit in (("optim.lrr=1", "'optim.lrr'"), ("", "is empty"), ("run.name='a", "quot")):
        sweep.write_text(f"optim.lr=1e-3\n{line}\n")
        outcome = command("submit", f"--sweep={sweep}", CONFIG, PATH=sbatch.path)
        assert_one_message(outcome, "my sweep.txt, line 2", culprit)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["optim.lrr=1"], "optim.lrr"),
        (["--ranks=0"], "--ranks=0"),
        (["--sbatch=exclusive"], "'exclusive'"),
        (["--sweep=nowhere.txt"], "nowhere.txt"),
        (["--sweep=configs/debug.yaml"], ".txt"),
    ],
)
def test_a_mistake_is_not_queued(arguments: list[str], culprit: str, sbatch: Sbatch, tmp_path: Path) -> None:
    before = contents(tmp_path)
    assert_one_message(command("submit", CONFIG, *arguments, PATH=sbatch.path), culprit)
    assert contents(tmp_path) == before


def test_without_slurm_and_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_one_message(command("submit", CONFIG, PATH=str(tmp_path)), "sbatch is not on this machine")
    monkeypatch.chdir(tmp_path)
    assert_one_message(command("submit", "optim.lr=0.1"), tmp_path, "repository root")


def test_torch_is_not_imported() -> None:
    program = "import sys, dist_train.commands.submit, dist_train.config.run_path; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=commands.REPOSITORY, check=False, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0
