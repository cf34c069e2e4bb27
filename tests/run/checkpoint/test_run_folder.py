"""An older run is never overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.errors import UserError
from dist_train.run.checkpoint.run_folder import RunFolder


def test_moving_aside_never_overwrites(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for nothing_to_keep in (folder.lock, folder.stop, folder.fault, folder.requeue):
        nothing_to_keep.touch()
        assert folder.move_aside() is None
    for number in (1, 2, 3):
        (folder.checkpoints / "step_00000001").mkdir(parents=True)
        (folder.checkpoints / "number").write_text(str(number))
        assert folder.move_aside() == tmp_path / f"run.old-{number}"
        folder.create()
    kept = [(tmp_path / f"run.old-{n}" / "checkpoints" / "number").read_text() for n in (1, 2, 3)]
    assert kept == ["1", "2", "3"]


@pytest.mark.parametrize("parent", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the run folder cannot be written"):
        RunFolder(tmp_path / parent / "run").create()
