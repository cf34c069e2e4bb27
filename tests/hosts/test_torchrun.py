"""torchrun over two hosts: the bits of one host; and when a cable or a launcher goes, everything ends and says why."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from tests.commands import REPOSITORY
from tests.hosts.network import Hosts
from tests.hosts.requirements import FOR_HOSTS, require
from tests.pace import AS_IT_COMES, Pace
from tests.patience import PATIENCE_SECONDS, wait_until
from tests.resume.jobs import finish, outcome, tiny_job, write_table

FIRST, SECOND = "first", "second"
# Not less: the first evaluation loads a library, and a busy machine takes its time.
TIMEOUT_SECONDS = 12.0
# A loaded machine may take its time to look: this much is no finding.
SLACK_SECONDS = 10.0
IN_THE_MIDDLE = Pace(slow_from=10, step_seconds=0.3)
SETTINGS = ("train.max_steps=60", "train.early_stopping_patience=null")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    require(FOR_HOSTS)
    with Hosts([FIRST, SECOND]) as running:
        yield running


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "clients.csv")


@pytest.fixture(scope="module")
def whole(table: Path) -> dict[str, Any]:
    """The outcome on two ranks of one host."""
    return finish(tiny_job(table, table.parent / "whole", *SETTINGS), 2)


class Job:
    """A training job with a rank on each host."""

    def __init__(self, hosts: Hosts, arguments: list[str], folder: Path, name: str, pace: Pace) -> None:
        self.hosts = hosts
        self.name = name
        self._logs = {host: folder / f"{name}-{host}.log" for host in hosts.addresses}
        self._agents = {host: self._agent(host, arguments, pace) for host in hosts.addresses}

    def _agent(self, host: str, arguments: list[str], pace: Pace) -> Popen[bytes]:
        rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={FIRST}:29400", f"--rdzv-id={self.name}")
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *rendezvous)
        with self._logs[host].open("wb") as log:
            return self.hosts.start(
                host, [*torchrun, str(REPOSITORY / "launch/train.py"), *arguments], log, pace.environment()
            )

    def agent(self, host: str) -> int:
        """The process of torchrun on a host."""
        (process,) = self.hosts.processes(host, f"--rdzv-id={self.name}")
        return process

    def ranks(self, host: str) -> list[int]:
        """The processes of the ranks on a host."""
        return self.hosts.processes(host, f"TORCHELASTIC_RUN_ID={self.name}")

    def wait(self) -> dict[str, int]:
        """Exit codes of the launchers, once nothing of the job is left on any host."""
        self.wait_until_gone(self.hosts.processes)
        return {host: agent.wait() for host, agent in self._agents.items()}

    def wait_until_gone(self, processes: Callable[[str], list[int]], seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until a host has none of these processes any more, and no other host has."""
        wait_until(lambda: not any(map(processes, self._agents)), "their end", self.logs, seconds=seconds, pause=0.2)

    def logs(self) -> str:
        """What was printed, host by host."""
        return "\n".join(f"--- {host}\n{log.read_text(errors='replace')}" for host, log in self._logs.items())


def wait_for_step(run_dir: Path, step: int) -> None:
    """Wait until a line of that step is in metrics.jsonl."""
    metrics = run_dir / "metrics.jsonl"

    def reached() -> bool:
        lines = metrics.read_bytes().splitlines() if metrics.exists() else []
        return bool(lines) and int(json.loads(lines[-1])["step"]) >= step

    wait_until(reached, f"step {step} in {metrics}")


def test_two_hosts_train_to_the_bits_of_one(hosts: Hosts, table: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    job = Job(hosts, tiny_job(table, tmp_path / "two", *SETTINGS), tmp_path, "bits", AS_IT_COMES)
    assert job.wait() == {FIRST: 0, SECOND: 0}, job.logs()
    assert outcome(tmp_path / "two") == whole


@pytest.mark.slow
def test_a_cut_cable_ends_all_ranks_with_a_report_and_the_run_goes_on_elsewhere(
    hosts: Hosts, table: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    arguments = tiny_job(table, tmp_path / "run", *SETTINGS)
    job = Job(hosts, [*arguments, f"runtime.timeout_seconds={TIMEOUT_SECONDS}"], tmp_path, "cut", IN_THE_MIDDLE)
    wait_for_step(tmp_path / "run", 12)
    hosts.split_evenly(SECOND)
    try:
        job.wait_until_gone(job.ranks, TIMEOUT_SECONDS + SLACK_SECONDS)
    finally:
        hosts.mend(SECOND)
    # torchrun itself, cut off, asks its store for a minute or for ever (torch 2.13); a cable or Slurm brings its end.
    assert all(job.wait().values()), job.logs()
    # Each side tells that the other does not answer, and in which step itself was.
    fault = (tmp_path / "run" / "fault.txt").read_text()
    reports = [part.splitlines() for part in fault.split("=== ")[1:]]
    assert len(reports) == 2, fault
    for title, verdict, *rest in reports:
        told_by, other = ((0, FIRST), (1, SECOND)) if FIRST in title else ((1, SECOND), (0, FIRST))
        assert title.endswith(f"told by rank {told_by[0]} (host {told_by[1]})"), fault
        assert verdict.startswith(f"rank {other[0]} (host {other[1]}, process "), fault
        assert "does not answer" in verdict, fault
        (own,) = (line for line in rest if line.startswith(f"--- rank {told_by[0]} "))
        step = re.search(r" in training, step (\d+): running$", own)
        assert step, fault
        assert int(step.group(1)) >= 12, fault
    assert finish(arguments, 2) == whole


@pytest.mark.slow
def test_without_its_launcher_a_rank_ends_and_so_do_the_others(
    hosts: Hosts, table: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    arguments = tiny_job(table, tmp_path / "run", *SETTINGS)
    job = Job(hosts, arguments, tmp_path, "orphan", IN_THE_MIDDLE)
    wait_for_step(tmp_path / "run", 12)
    os.kill(job.agent(SECOND), signal.SIGKILL)
    codes = job.wait()
    assert all(codes.values()), job.logs()
    assert "saved" in job.logs()
    verdict = (tmp_path / "run" / "fault.txt").read_text().splitlines()[1]
    assert re.match(
        rf"rank 1 \(host {SECOND}, .*\) in stopping, step \d+: its launcher \(torchrun\) has died", verdict
    ), verdict
    assert finish(arguments, 2) == whole
