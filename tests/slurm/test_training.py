"""The job script as it is, on several nodes: the weights of one host and of one process; no run disturbs another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.commands import train
from tests.pace import SLOW
from tests.slurm.cluster import Cluster
from tests.slurm.submissions import arguments, submit


def test_two_nodes_train_as_one_host_and_as_one_process(
    cluster: Cluster, table: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    exact = submit(cluster, table, tmp_path / "exact", ranks=2)
    fast = submit(cluster, table, tmp_path / "fast", "train.virtual_ranks=null")
    here = train(tmp_path / "here", *arguments(table, tmp_path / "here", "train.virtual_ranks=null"), ranks=2)
    assert exact.completed(restarts=0) == whole
    assert exact.summary()["world_size"] == 4
    assert fast.completed(restarts=0)["weights_sha256"] == here["weights_sha256"]
    assert fast.summary()["world_size"] == here["world_size"] == 2


def test_a_second_job_on_a_run_folder_is_refused_and_told_who_holds_it(
    cluster: Cluster, table: Path, tmp_path: Path
) -> None:
    first = submit(cluster, table, tmp_path / "run", sbatch=["--nodes=1"], pace=SLOW)
    first.wait_for_step()
    host = cluster.nodes_of(first.id)[0]
    second = submit(cluster, table, tmp_path / "run", sbatch=["--nodes=1"])
    known = cluster.wait_for_end(second.id)
    assert known["JobState"] == "FAILED"
    assert known["Restarts"] == "0"
    assert f"host {host}" in second.output()
    assert f"job {first.id}" in second.output()
    assert cluster.job(first.id)["JobState"] == "RUNNING"
    cluster.command("scancel", first.id)
