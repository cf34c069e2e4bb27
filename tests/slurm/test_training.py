"""The job script as it is: several nodes come to the weights of one host and of one process."""

from __future__ import annotations

import pytest

from tests.commands import train
from tests.resume.jobs import outcome
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import arguments, submit

pytestmark = pytest.mark.timeout(400)


@side_by_side
def test_two_nodes_train_as_one_process(stage: Stage) -> None:
    job = submit(stage, sbatch=["--nodes=2"])
    assert job.completed(restarts=0) == stage.whole
    assert job.summary()["world_size"] == 2


@pytest.mark.slow
@side_by_side
def test_there_is_a_rank_for_each_gpu(stage: Stage) -> None:
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


@pytest.mark.slow
@side_by_side
def test_an_array_of_seeds_leaves_a_run_folder_for_each(stage: Stage) -> None:
    job = submit(stage, sbatch=["--nodes=1", "--array=0-3"], script="slurm/array.sbatch")
    elements = [f"{job.id}_{seed}" for seed in range(4)]
    for element in elements:
        known = stage.cluster.wait_for_end(element)
        assert (known["JobState"], known["Restarts"]) == ("COMPLETED", "0"), stage.cluster.logs(element)
    folders = sorted(stage.run_dir.parent.glob(f"{stage.run_dir.name}-seed*/"))
    assert [folder.name for folder in folders] == [f"{stage.run_dir.name}-seed{seed}" for seed in range(4)]
    assert len({outcome(folder)["weights_sha256"] for folder in folders}) == 4
    assert outcome(folders[0]) == stage.whole  # whose seed is 0 as well
