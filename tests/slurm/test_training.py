"""The job script as it is: several nodes come to the weights of one host and of one process."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from tests.commands import REPOSITORY, train
from tests.pace import Pace
from tests.resume.jobs import outcome
from tests.slurm.stories import Stage, side_by_side
from tests.slurm.submissions import arguments, checkout, plain_script, submit


@pytest.mark.slow  # in the daily suite, the job of test_commands.py is one of two nodes
@side_by_side
def test_two_nodes_train_as_one_process(stage: Stage) -> None:
    job = submit(stage, sbatch=["--nodes=2"])
    assert job.completed(restarts=0) == stage.whole
    assert job.summary()["world_size"] == 2


@pytest.mark.slow
@side_by_side
def test_the_default_job_as_it_is(stage: Stage) -> None:
    """`sbatch slurm/train.sbatch configs/credit_risk.yaml`, and nothing more, on two nodes."""
    config = REPOSITORY / "configs" / "credit_risk.yaml"
    exact = ("runtime.device=cpu", "train.virtual_ranks=4")
    plainly, exactly = checkout(stage.run_dir / "plainly"), checkout(stage.run_dir / "exactly")
    for root, more in ((plainly, ()), (exactly, exact)):
        here = stage.run_dir / f"{root.name}-here"
        summary = train(here, config, *more, ranks=1 if more else 2)
        job = stage.cluster.command(
            *("sbatch", "--parsable", "--nodes=2", "slurm/train.sbatch", "configs/credit_risk.yaml", *more),
            environ={"DIST_TRAIN_VENV": sys.prefix}, cwd=root,
        ).strip()  # fmt: skip
        known = stage.cluster.wait_for_end(job)
        assert (known["JobState"], known["Restarts"]) == ("COMPLETED", "0"), stage.cluster.logs(job)
        found = json.loads((root / "runs/credit_risk/summary.json").read_text())
        assert (found["world_size"], found["weights_sha256"]) == (2, summary["weights_sha256"])
        assert (root / f"slurm-{job}.out").exists()
        assert len(list(root.glob(f"slurm-{job}-*.out"))) == 2  # and one of each node


@pytest.mark.slow
@side_by_side
def test_srun_alone_starts_ranks_as_well(stage: Stage) -> None:
    job = submit(stage, sbatch=["--nodes=2", "--ntasks-per-node=2"], script=plain_script(stage))
    assert job.completed(restarts=0) == stage.whole
    assert job.summary()["world_size"] == 4


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


@pytest.mark.slow
@side_by_side
def test_an_element_of_an_array_is_requeued_without_the_others(stage: Stage) -> None:
    array = submit(stage, sbatch=["--nodes=1", "--array=0-1"], script="slurm/array.sbatch", pace=Pace(step_seconds=0.7))
    elements = [
        replace(array, id=f"{array.id}_{seed}", run_dir=stage.run_dir.with_name(f"{stage.run_dir.name}-seed{seed}"))
        for seed in range(2)
    ]
    elements[0].wait_for_step()
    stage.cluster.command("scancel", "--batch", "--signal=USR1", elements[0].id)
    assert elements[0].completed(restarts=1) == stage.whole
    elements[1].completed(restarts=0)
