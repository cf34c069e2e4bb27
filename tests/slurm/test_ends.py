"""A job that is to end ends: cancelled, broken, misspelt, or out of attempts, and nothing brings it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.pace import SLOW, Pace
from tests.slurm.cluster import Cluster
from tests.slurm.submissions import submit

ONE_NODE = ["--nodes=1"]


def test_a_cancelled_job_has_saved_and_stays_cancelled_and_a_new_one_goes_on(
    cluster: Cluster, table: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    job = submit(cluster, table, tmp_path / "run", sbatch=["--nodes=2"], pace=SLOW)
    job.wait_for_step()
    cluster.command("scancel", job.id)
    known = cluster.wait_for_end(job.id)
    assert known["JobState"] == "CANCELLED"
    assert known["Restarts"] == "0"
    again = submit(cluster, table, tmp_path / "run", sbatch=ONE_NODE)
    assert again.completed(restarts=0) == whole


def test_a_fault_ends_the_job_and_a_mistake_as_well(cluster: Cluster, table: Path, tmp_path: Path) -> None:
    broken = submit(cluster, table, tmp_path / "broken", pace=Pace(crash_at=30))
    misspelt = submit(cluster, table, tmp_path / "misspelt", "optim.learning_rate=1", sbatch=ONE_NODE)
    for job, words in (broken, "a fault in step 30"), (misspelt, "learning_rate"):
        known = cluster.wait_for_end(job.id)
        assert known["JobState"] == "FAILED", cluster.logs(job.id)
        assert known["Restarts"] == "0"
        assert words in job.output()
        assert not (job.run_dir / "requeue").exists()
    assert not misspelt.run_dir.exists()
