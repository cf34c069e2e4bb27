"""The job script as it is: several nodes come to the weights of one host and of one process."""

from __future__ import annotations

import pytest

from tests.commands import train
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import arguments, submit

pytestmark = pytest.mark.timeout(400)


@side_by_side
def test_two_nodes_train_as_one_process(stage: Stage) -> None:
    job = submit(stage, sbatch=["--nodes=2", "--gpus-per-node=2"])
    assert job.completed(restarts=0) == stage.whole
    assert job.summary()["world_size"] == 4


@pytest.mark.slow
@side_by_side
def test_two_nodes_train_as_torchrun_on_one_host(stage: Stage) -> None:
    job = submit(stage, "train.virtual_ranks=null", sbatch=["--nodes=2"], environ={"NPROC_PER_NODE": "1"})
    here = stage.run_dir.with_name("here")
    summary = train(here, *arguments(stage.table, here, "train.virtual_ranks=null"), ranks=2)
    assert job.completed(restarts=0)["weights_sha256"] == summary["weights_sha256"]
    assert job.summary()["world_size"] == summary["world_size"] == 2
