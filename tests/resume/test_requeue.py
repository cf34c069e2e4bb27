"""A job that its scheduler starts again: it waits for its former self, and goes on with what it has begun."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from dist_train.run.checkpoint.lock import RunLock, this_process
from tests.resume.conftest import Whole
from tests.resume.jobs import Ended, Trap, finish, outcome, run_job, tiny_job

STEPS = "train.max_steps=40"


def _attempt(restart: int, job: str = "123") -> dict[str, str]:
    """As Slurm sets them: there is no count before the first restart."""
    return {"SLURM_JOB_ID": job} | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {})


def _old_runs(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.parent.glob("run.old-*"))


def test_never_means_once_for_a_job_and_not_at_each_restart(table: Path, tmp_path: Path) -> None:
    ranks = 2
    run_dir = tmp_path / "run"
    whole = finish(tiny_job(table, tmp_path / "whole", STEPS), ranks)
    assert run_job(tiny_job(table, run_dir, STEPS), ranks, Trap(step=20), _attempt(0, "99")).killed  # an older run

    arguments = tiny_job(table, run_dir, STEPS, "run.resume=never")
    assert run_job(arguments, ranks, Trap(step=3), _attempt(0)).killed  # before its first checkpoint
    assert _old_runs(run_dir) == ["run.old-1"]
    assert run_job(arguments, ranks, Trap(step=12), _attempt(1)).killed
    assert _old_runs(run_dir) == ["run.old-1"]
    ended = run_job(arguments, ranks, None, _attempt(2))
    assert ended.codes == [0] * ranks, ended.errors
    assert "resuming from the checkpoint of step 10" in ended.errors[0]
    assert _old_runs(run_dir) == ["run.old-1"]
    assert outcome(run_dir) == whole
    state = max((run_dir / "checkpoints").iterdir()) / "state.json"
    assert json.loads(state.read_text())["job"] == "123"


@pytest.mark.parametrize(
    "environ", [{}, _attempt(0), _attempt(1, "124")], ids=["no job", "the command typed again in it", "another job"]
)
def test_never_moves_aside_what_anything_else_has_begun(table: Path, tmp_path: Path, environ: dict[str, str]) -> None:
    arguments = tiny_job(table, tmp_path / "run", "train.max_steps=11", "run.resume=never")
    for step, former in ((3, ["run.old-1"]), (9, ["run.old-1", "run.old-2"])):
        assert run_job(arguments, 1, Trap(step=step), _attempt(0)).killed
        ended = run_job(arguments, 1, None, environ)
        assert ended.codes == [0], ended.errors
        assert "resuming" not in ended.errors[0]
        assert _old_runs(tmp_path / "run")[: len(former)] == former


def test_outside_slurm_no_checkpoint_belongs_to_this_job(table: Path, tmp_path: Path) -> None:
    arguments = tiny_job(table, tmp_path / "run", "train.max_steps=11", "run.resume=never")
    for number in (0, 1):
        assert run_job(arguments, 1).codes == [0]
        assert len(_old_runs(tmp_path / "run")) == number


def test_a_restart_waits_for_its_former_self_longer_than_its_collectives_do(
    table: Path, tmp_path: Path, uninterrupted: Whole
) -> None:
    arguments = tiny_job(table, tmp_path / "run")
    assert run_job(arguments, 2, Trap(step=12), _attempt(0)).killed
    ended: list[Ended] = []
    again = [*arguments, "runtime.timeout_seconds=8"]
    restart = threading.Thread(target=lambda: ended.append(run_job(again, 2, None, _attempt(1))))
    with RunLock(tmp_path / "run" / "lock", this_process(_attempt(0))):
        restart.start()
        restart.join(12)
        assert restart.is_alive(), ended
    restart.join()
    assert ended[0].codes == [0, 0], ended[0].errors
    waiting = "waiting up to 18 s until an earlier attempt of this job has left the run folder: host"
    assert ended[0].errors[0].count(waiting) == 1
    assert ended[0].errors[1] == ""
    assert outcome(tmp_path / "run") == uninterrupted(2)[0]
