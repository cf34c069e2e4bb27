"""Log lines and the end of a process, as another process sees them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.commands import REPOSITORY, environment
from tests.patience import PATIENCE_SECONDS

PROGRAM = """
import logging, os, sys
from dist_train.errors import TrainingFault, UserError
from dist_train.system import console
console.QUIET_RANK_GRACE_SECONDS = 0.01
def main():
    console.log.info("an info")
    console.log.warning("a warning")
    print("an answer")
    {body}
console.run_command(main)
"""


def run(body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        cwd=REPOSITORY,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_rank_0_says_everything_and_answers_stay_alone_on_stdout() -> None:
    done = run("pass")
    assert (done.returncode, done.stdout) == (0, "an answer\n")
    lines = done.stderr.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["an info", "a warning"]


@pytest.mark.parametrize(
    "variables", [{"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}]
)
def test_lines_name_the_rank_where_there_are_several(variables: dict[str, str]) -> None:
    lines = run("pass", **variables).stderr.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["[rank 0] an info", "[rank 0] a warning"]


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}])
def test_one_rank_is_no_news(variables: dict[str, str]) -> None:
    assert "[rank" not in run("pass", **variables).stderr


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_are_silent_below_warning(variable: str) -> None:
    done = run("pass", **{variable: "3"})
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == ["[rank 3] a warning"]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise UserError('no such file')", 2, "error: no such file"),
        ("raise TrainingFault('the loss is nan')", 1, "error: the loss is nan"),
        ("sys.exit(2)", 2, None),
        ("sys.exit()", 0, None),
        ("raise KeyboardInterrupt", 130, None),
    ],
)
def test_exit_codes_without_a_traceback(body: str, code: int, said: str | None) -> None:
    done = run(body)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == ([said] if said else [])
    assert done.stdout == "an answer\n"


UNDER_TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
ENDED_WHILE_IT_WAITS = "console.time.sleep = lambda _: os._exit(7); raise UserError('no such file')"


@pytest.mark.parametrize("variables", [UNDER_TORCHRUN, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}])
def test_a_mistake_is_said_by_rank_0_alone(variables: dict[str, str]) -> None:
    done = run(ENDED_WHILE_IT_WAITS, **variables)
    assert done.returncode == 7
    assert "no such file" not in done.stderr


def test_a_quiet_rank_that_nobody_ends_says_the_mistake_itself() -> None:
    done = run("raise UserError('no such file')", **UNDER_TORCHRUN)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: no such file"


def test_in_a_half_set_environment_every_rank_speaks_at_once() -> None:
    done = run(ENDED_WHILE_IT_WAITS, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: no such file"


def test_a_reader_that_has_gone_is_no_fault_of_the_program() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(body="sys.stdout.flush()")],
            cwd=REPOSITORY, env=environment(), stdout=write, stderr=subprocess.PIPE, text=True,
            timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_fault_of_the_program_shows_where() -> None:
    done = run("1 / 0", RANK="1")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
