"""Commands under torchrun that tests signal and kill, by process id, and never leave behind. Linux."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.commands import REPOSITORY, environment
from tests.patience import PATIENCE_SECONDS, wait_until


def children(parent: int) -> list[int]:
    """Processes started by `parent`; they are in sessions of their own, so no group leads to them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(path.parent.name))
    return sorted(found)


def running(process: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_of(arguments: list[str]) -> list[int]:
    """Every process with these arguments of a job on its command line, whoever its parent is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if "\0".join(arguments) in path.read_text() and running(int(path.parent.name)):
                found.append(int(path.parent.name))
    return found


class Job:
    """A training job under torchrun."""

    def __init__(self, arguments: list[str], ranks: int, log: Path, **trap: Any) -> None:
        self._arguments, self._log = arguments, log
        setting = dict(a.split("=", 1) for a in arguments if "=" in a)
        self._metrics = Path(setting["run.dir"]) / setting["run.name"] / "metrics.jsonl"
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
                    *(str(REPOSITORY / "tests" / "resume" / "driver.py"), json.dumps(trap), *arguments),
                ],
                env=environment(PYTHONPATH=str(REPOSITORY)),
                cwd=REPOSITORY,
                stdout=stream,
                stderr=stream,
            )
        self.launcher = self._process.pid
        self.ranks: list[int] = []
        """Processes of the ranks, in rank order, once `wait_for_step` has returned."""
        self._num_ranks = ranks

    def wait_for_step(self, step: int) -> None:
        """Wait until a line of that step or a later one has been written by this job."""
        wait_until(lambda: self._reached(step), f"a line of step {step} in {self._metrics}", self.log)
        self.ranks = sorted(filter(_is_rank, children(self.launcher)), key=_rank_of)
        assert len(self.ranks) == self._num_ranks

    def _reached(self, step: int) -> bool:
        assert self._process.poll() is None, self.log()
        with suppress(OSError, ValueError, IndexError):
            lines = self._metrics.read_bytes().splitlines()
            return int(json.loads(lines[-1])["step"]) >= step
        return False

    def kill_all(self) -> None:
        """SIGKILL to the launcher and every rank."""
        for process in (self.launcher, *self.ranks):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Exit code of the launcher, once every rank has gone as well."""
        code = self._process.wait(PATIENCE_SECONDS)
        wait_until(lambda: not any(running(rank) for rank in self.ranks), "the ranks to leave", self.log)
        return code

    def log(self) -> str:
        """What was written to stdout and stderr."""
        return self._log.read_text(errors="replace")


def _is_rank(process: int) -> bool:
    return b"\0RANK=" in Path(f"/proc/{process}/environ").read_bytes()


def _rank_of(process: int) -> int:
    return int(Path(f"/proc/{process}/environ").read_bytes().split(b"\0RANK=")[1].split(b"\0")[0])


@contextmanager
def job(arguments: list[str], ranks: int, log: Path, **trap: Any) -> Iterator[Job]:
    """Start a job; whatever of it still runs at the end of the block is killed."""
    started = Job(arguments, ranks, log, **trap)
    try:
        yield started
    finally:
        started.ranks = sorted({*started.ranks, *children(started.launcher)})
        started.kill_all()
