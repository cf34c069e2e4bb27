"""One rank goes wrong: all ranks end with a failure soon, and one report says which rank, where and why."""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

from tests.patience import wait_until
from tests.resume.conftest import Whole
from tests.resume.faults import Aftermath, Fault, Kind, run_with_fault
from tests.resume.jobs import finish, folder_of, tiny_job
from tests.resume.processes import job, processes_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks look at each other by way of /proc")

TIMEOUT_SECONDS = 6
# Phase -> the collective in it at which a rank goes wrong: neither the first one nor that of the first step, nor one of
# `lockstep`, which makes up for a round that a rank has skipped.
PHASES = {"training": 40, "evaluation": 3, "encoder fitting": 7, "checkpointing": 2}
KINDS = ("raise", "sleep", "kill", "stop", "skip")
VERDICTS: dict[str, str] = {
    "raise": "failed: ZeroDivisionError: injected",
    "sleep": "has not come to the collective in which the others wait",
    "kill": "is gone",
    "stop": "is stopped (SIGSTOP)",
    "skip": "it has skipped a collective",
}


def injected(
    kind: Kind, phase: str, ranks: int, table: Path, folder: Path, culprit: int | None = None
) -> tuple[list[str], Aftermath]:
    """A job in which a rank, the last one if none is named, has gone wrong; its arguments and its end."""
    arguments = tiny_job(table, folder / kind / "run", f"runtime.timeout_seconds={TIMEOUT_SECONDS}")
    fault = Fault(kind, ranks - 1 if culprit is None else culprit, phase, PHASES[phase])
    return arguments, run_with_fault(arguments, ranks, fault)


def check(kind: str, phase: str, ranks: int, culprit: int, arguments: list[str], after: Aftermath) -> None:
    said = f"{kind} in {phase} on {ranks} ranks: {after}"
    assert all(code != 0 for code in after.codes), said
    assert after.seconds_after_fault < TIMEOUT_SECONDS + 10, said
    report = (folder_of(arguments) / "fault.txt").read_text()
    verdict = report.splitlines()[1]
    # A rank that skipped a checkpoint's collective is found in what comes next.
    where = f"in {phase}" if kind != "skip" else "in "
    assert verdict.startswith(f"rank {culprit} (host "), said + report
    assert where in verdict, said + report
    # As soon as the next collective of the rank that skipped one meets another one, gloo may abort that rank, or it
    # fails by itself on what it was not meant to get.
    verdicts = (VERDICTS[kind], "crashed: Aborted", "failed: ") if kind == "skip" else (VERDICTS[kind],)
    assert any(words in verdict for words in verdicts), said + report
    step = re.search(r", step (\d+): ", verdict)
    assert (int(step.group(1)) if step else 0) in {after.step, after.step + (kind == "skip")}, said + report
    for rank in range(ranks):
        assert f"--- rank {rank} (host " in report, said + report
    stacks = len(re.findall("most recent call first", report))
    assert stacks >= ranks - (kind == "kill"), said + report
    errors = [line for text in after.errors for line in text.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {verdict}"], said
    assert sum(text.count("ZeroDivisionError: injected") for text in after.errors) == (2 if kind == "raise" else 0)


EVERY_DAY = [("training", 2, 1), ("encoder fitting", 2, 0)]
ALL = [(phase, ranks, culprit) for phase in PHASES for ranks in (2, 4) for culprit in (0, ranks - 1)]


@pytest.mark.parametrize(
    ("phase", "ranks", "culprit"), [pytest.param(*c, marks=[] if c in EVERY_DAY else pytest.mark.slow) for c in ALL]
)
def test_the_report_names_the_rank_to_blame(phase: str, ranks: int, culprit: int, table: Path, tmp_path: Path) -> None:
    assert set(KINDS) | {"ask"} == set(get_args(Kind))
    with ThreadPoolExecutor(3) as pool:  # they mostly wait
        ended = pool.map(lambda kind: injected(kind, phase, ranks, table, tmp_path, culprit), KINDS)  # type: ignore[arg-type]
        for kind, (arguments, after) in zip(KINDS, ended, strict=True):
            check(kind, phase, ranks, culprit, arguments, after)


@pytest.mark.parametrize("kind", [k if k == "kill" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_under_torchrun_the_report_comes_first_and_nothing_is_left(kind: Kind, table: Path, tmp_path: Path) -> None:
    """torchrun ends the others as soon as one rank has gone; who is to blame is known all the same."""
    arguments = tiny_job(table, tmp_path / "run", f"runtime.timeout_seconds={TIMEOUT_SECONDS}")
    mark = tmp_path / "mark"
    with job(arguments, 2, tmp_path / "log", fault=[kind, 1, "training", PHASES["training"]], mark=str(mark)) as faulty:
        assert faulty.wait() == 1, faulty.log()
        seconds = time.time() - mark.stat().st_mtime
    assert seconds < TIMEOUT_SECONDS + 10, faulty.log()
    wait_until(lambda: not processes_of(arguments), "every rank to leave", faulty.log)
    verdict = (folder_of(arguments) / "fault.txt").read_text().splitlines()[1]
    assert verdict.startswith("rank 1 (host "), verdict
    step = int(mark.read_text())
    # Who has skipped the last collective of a step may be found in the next one.
    assert any(f"in training, step {found}: " in verdict for found in (step, step + (kind == "skip"))), verdict
    assert VERDICTS[kind] in verdict
    assert faulty.log().count("error: ") == faulty.log().count(f"error: {verdict}") == 1
    assert faulty.log().index("error: ") < faulty.log().index("driver.py FAILED")  # which is what torchrun says


@pytest.mark.parametrize(("kind", "phase"), [("kill", "training"), ("skip", "checkpointing"), ("raise", "evaluation")])
def test_after_a_fault_the_same_command_continues(
    kind: Kind, phase: str, table: Path, tmp_path: Path, uninterrupted: Whole
) -> None:
    arguments, after = injected(kind, phase, 2, table, tmp_path)
    assert all(code != 0 for code in after.codes), after
    assert finish(arguments, 2) == uninterrupted(2)[0]


def test_alone_a_failure_is_a_traceback(table: Path, tmp_path: Path) -> None:
    arguments, after = injected("raise", "training", 1, table, tmp_path)
    assert after.codes == [1]
    assert after.errors[0].count("Traceback") == 1
    assert not (folder_of(arguments) / "fault.txt").exists()


# Phase -> the collective in it at which the request comes.
HEARD = {
    "reading the data": 1,
    "encoder fitting": 2,
    "encoding the data": 1,
    "evaluation": 2,
    "checkpointing": 2,
    "exporting the model": 1,
}


@pytest.mark.parametrize("phase", HEARD)
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_request_to_stop_is_heard_everywhere(
    phase: str, ranks: int, table: Path, tmp_path: Path, uninterrupted: Whole
) -> None:
    arguments = tiny_job(table, tmp_path / "run")
    after = run_with_fault(arguments, ranks, Fault("ask", ranks - 1, phase, HEARD[phase]))
    assert after.codes == [0] * ranks, after
    run_dir = folder_of(arguments)
    assert '"cause": "SIGUSR1"' in (run_dir / "requeue").read_text()
    assert not (run_dir / "summary.json").exists()
    if phase in ("reading the data", "encoder fitting", "encoding the data"):
        assert [path.name for path in run_dir.iterdir()] == ["requeue"]
    assert finish(arguments, ranks) == uninterrupted(ranks)[0]
