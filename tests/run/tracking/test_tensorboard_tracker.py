"""TensorBoard: every number once, and training that does not depend on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dist_train.run.tracking.tensorboard_tracker import TensorBoardTracker

LINE = {"step": 5, "split": "valid", "loss": 0.5, "accuracy": 0.75, "per_class": {"a": {}}, "selected_by": "loss"}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events: Any = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore")  # those of tensorboard's own imports
def test_numbers_are_written_and_steps_that_are_trained_again_are_not_shown_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = TensorBoardTracker(folder=tmp_path, enabled=True, start_step=0)
    first.log(LINE)
    first.log(LINE | {"step": 10, "loss": 0.4})
    first.close()
    first.close()
    second = TensorBoardTracker(folder=tmp_path, enabled=True, start_step=5)
    second.log(LINE | {"step": 10, "loss": 0.3})
    second.close()
    found = scalars(tmp_path)
    assert set(found) == {"valid/loss", "valid/accuracy"}
    assert [(step, round(value, 6)) for step, value in found["valid/loss"]] == [(5, 0.5), (10, 0.3)]


def test_disabled_it_writes_nothing_and_where_it_is_not_installed_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    TensorBoardTracker(folder=tmp_path, enabled=False, start_step=0).log(LINE)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tracker = TensorBoardTracker(folder=tmp_path, enabled=True, start_step=0)
    tracker.log(LINE)
    tracker.close()
    assert "tensorboard is not installed" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_a_failure_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file in its place")
    tracker = TensorBoardTracker(folder=tmp_path, enabled=True, start_step=0)
    tracker.log(LINE)
    tracker.close()
    assert caplog.text.count("training goes on without it") == 1
