"""Whatever stops a job on a cluster, it goes on by itself and ends with the bits of the run that nobody interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.pace import SLOW, Pace
from tests.slurm.cluster import Cluster
from tests.slurm.submissions import preempt, submit

SIDE_BY_SIDE = 4
Outcome = dict[str, Any]
Scenario = Callable[[Cluster, Path, Path], Outcome]


def warned_of_the_time_limit(cluster: Cluster, table: Path, run_dir: Path) -> Outcome:
    """Slurm sends the signal of --signal some time before the limit. One wandb run in all attempts."""
    options = ["--nodes=2", "--time=1", "--signal=B:USR1@40"]
    job = submit(cluster, table, run_dir, "wandb.mode=offline", sbatch=options, pace=SLOW)
    job.wait_for_restart()
    cluster.command("scontrol", "update", f"jobid={job.id}", "timelimit=60")
    outcome = job.completed(restarts=1)
    runs = [path.name for path in (run_dir / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len({name.rpartition("-")[2] for name in runs}) == 1
    return outcome


def preempted(cluster: Cluster, table: Path, run_dir: Path) -> Outcome:
    """A job of a higher partition takes the nodes: Slurm sends TERM."""
    job = submit(cluster, table, run_dir, pace=SLOW)
    job.wait_for_step()
    with cluster.preempting():
        preempt(cluster, job)
        job.wait_for_restart()
    return job.completed(restarts=1)


def preempted_while_importing(cluster: Cluster, table: Path, run_dir: Path) -> Outcome:
    """As above, before Python has come to a line of ours."""
    job = submit(cluster, table, run_dir, sbatch=["--nodes=1"], pace=Pace(import_seconds=15))
    job.wait_for_output("importing")
    with cluster.preempting():
        preempt(cluster, job)
        job.wait_for_restart()
    return job.completed(restarts=1)


def preempted_with_the_users_signal(cluster: Cluster, table: Path, run_dir: Path) -> Outcome:
    """A cluster with `preempt_send_user_signal` sends the signal of --signal in TERM's place."""
    job = submit(cluster, table, run_dir, sbatch=["--nodes=1"], pace=SLOW)
    job.wait_for_step()
    with cluster.preempting(user_signal=True):
        preempt(cluster, job)
        job.wait_for_restart()
    return job.completed(restarts=1)


def requeued_by_hand(cluster: Cluster, table: Path, run_dir: Path) -> Outcome:
    """`scontrol requeue` gives the job KillWait seconds."""
    job = submit(cluster, table, run_dir, sbatch=["--nodes=1"], pace=SLOW)
    job.wait_for_step()
    cluster.command("scontrol", "requeue", job.id)
    return job.completed(restarts=1)


def second_node_lost(cluster: Cluster, table: Path, run_dir: Path) -> Outcome:
    """Nobody hears of it; Slurm gives the node up, and the job goes on with the node that is left."""
    options = ["--nodes=1-2", "--partition=island"]
    job = submit(cluster, table, run_dir, sbatch=options, pace=SLOW)
    job.wait_for_step()
    first, second = cluster.nodes_of(job.id)
    cluster.hosts.cut(second)
    try:
        outcome = job.completed(restarts=1)
        assert cluster.job(job.id)["NodeList"] == first
    finally:
        cluster.restore(second)
    return outcome


EVERYDAY: list[Scenario] = [
    warned_of_the_time_limit,
    preempted,
    second_node_lost,
    preempted_while_importing,
]
LONG: list[Scenario] = [
    preempted_with_the_users_signal,
    requeued_by_hand,
]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, cluster: Cluster, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Outcome]]]:
    """The scenarios that this session has tests of, begun side by side: they spend their time on waiting."""
    chosen = [item.callspec.params["scenario"] for item in request.session.items if _is_scenario(item)]
    pool = ThreadPoolExecutor(SIDE_BY_SIDE)
    folder = tmp_path_factory.mktemp("interruptions")
    yield {s.__name__: pool.submit(s, cluster, table, folder / s.__name__) for s in chosen}
    pool.shutdown(wait=False, cancel_futures=True)


def _is_scenario(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and item.originalname == "test_it_ends_as_if_nothing_had_happened"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "scenario", [*EVERYDAY, *(pytest.param(s, marks=pytest.mark.slow) for s in LONG)], ids=lambda s: s.__name__
)
def test_it_ends_as_if_nothing_had_happened(
    scenario: Scenario, outcomes: dict[str, Future[Outcome]], whole: Outcome
) -> None:
    assert outcomes[scenario.__name__].result() == whole
