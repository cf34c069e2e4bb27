"""The cluster itself: it is several hosts, and leaves nothing behind, however its owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, environment
from tests.hosts.requirements import FOR_SLURM, require
from tests.patience import PATIENCE_SECONDS, wait_until
from tests.slurm.cluster import Cluster

HOLDER = """
import sys, time
from tests.slurm.cluster import Cluster
with Cluster(size=6) as cluster:
    cluster.command("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 1000")
    cluster.command("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 1000 & setsid sleep 1000 & wait")
    while len(cluster.command("squeue", "--noheader", "--states=RUNNING").splitlines()) < 2: time.sleep(0.1)
    print(cluster.nodes[0].split("-")[0], flush=True)
    sys.stdin.read()
"""


def test_a_job_runs_on_hosts_of_their_own(cluster: Cluster) -> None:
    words = cluster.command(
        "srun", "--nodes=2", "--gpus-per-node=2", "sh", "-c", "echo $(hostname) $SLURM_GPUS_ON_NODE"
    )
    assert sorted(words.splitlines()) == [f"{node} 2" for node in cluster.nodes[:2]]


@pytest.mark.parametrize("kill", [False, True], ids=["at-its-end", "after-kill-9"])
def test_nothing_is_left(kill: bool, tmp_path: Path) -> None:
    require(FOR_SLURM)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=str(REPOSITORY), TMPDIR=str(temporary)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin
    assert holder.stdout
    try:
        token = holder.stdout.readline().strip()
        assert token
        children = traces(token)
        assert len(children) > 10  # or this test looks in the wrong places
        if kill:
            os.kill(holder.pid, signal.SIGKILL)
        else:
            holder.stdin.close()
        holder.wait(PATIENCE_SECONDS)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        holder.stdin.close()
    wait_until(lambda: not traces(token), "its end", lambda: traces(token))
    assert not list(temporary.iterdir())


def traces(token: str) -> list[str]:
    """Processes (by command line or environment) and freezer groups of a cluster with this word in its hosts' names."""
    found = [str(path) for path in Path("/sys/fs/cgroup").glob(f"freezer/*{token}*")]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            if token.encode() in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found
