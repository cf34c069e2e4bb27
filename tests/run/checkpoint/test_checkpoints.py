"""The newest checkpoint that verifies wins; the newest and the best are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train.errors import UserError
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import MANIFEST


def _parts(step: int) -> dict[str, object]:
    return {"model.pth": {"w": torch.full((2,), float(step))}, "state.json": {"step": step}}


def _written(folder: Path, *steps: int, keep: int = 2, best: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.write(step, _parts(step), best)
    return checkpoints


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [40]), (2, None, [30, 40]), (9, None, [10, 20, 30, 40]), (1, 10, [10, 40]), (2, 40, [30, 40])],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    checkpoints = _written(tmp_path, 10, 20, 30, 40, keep=keep, best=best)
    assert checkpoints.steps() == left
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"step_{step:08d}" for step in left]


def test_nothing_goes_when_the_new_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = _written(tmp_path, 10, 20)

    def full(_handle: int) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.write(30, _parts(30), None)
    assert checkpoints.steps() == [10, 20]
    found, skipped = checkpoints.newest()
    assert found
    assert (found.step, skipped) == (20, [])


def test_a_run_folder_that_has_gone_does_not_come_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        Checkpoints(tmp_path / "gone" / "checkpoints", 1).write(10, _parts(10), None)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_that_verifies_wins_and_the_skipped_are_named(tmp_path: Path) -> None:
    checkpoints = _written(tmp_path, 10, 20, 30, keep=9)
    (tmp_path / "step_00000030" / MANIFEST).unlink()
    part = tmp_path / "step_00000020" / "model.pth"
    part.write_bytes(part.read_bytes()[:-1])
    found, skipped = checkpoints.newest()
    assert found
    assert found.step == 10
    assert torch.equal(found.parts["model.pth"]["w"], torch.tensor([10.0, 10.0]))
    assert len(skipped) == 2
    assert "step_00000030" in skipped[0]
    assert "step_00000020/model.pth has" in skipped[1]
    with pytest.raises(UserError, match=r"checkpoint of step 20 is damaged: .*model\.pth"):
        checkpoints.read(20)
    with pytest.raises(UserError, match="no checkpoint of step 25; there is 10, 20, 30"):
        checkpoints.read(25)
    checkpoints.drop_after(10)
    assert checkpoints.steps() == [10]


def test_there_may_be_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "missing", 2)
    assert checkpoints.newest() == (None, [])
    checkpoints.drop_after(0)
    with pytest.raises(UserError, match="there is none"):
        checkpoints.read(1)


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoints = _written(tmp_path, 10)
    for name in ("step_best", "step_", "step_-3", ".partial-step_00000020", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == [10]
