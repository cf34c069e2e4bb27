"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from dist_train.run.tracking.console_tracker import ConsoleTracker
from dist_train.training.selection import Selection


def _train(step: int, rate: float | None = 1000.0) -> dict[str, Any]:
    return {
        "step": step, "epoch": 2, "samples": step * 100, "split": "train", "loss": 0.51234, "learning_rate": 1e-3,
        "samples_per_second": rate,
    }  # fmt: skip


def _valid(auroc: float | None = 0.8) -> dict[str, Any]:
    return {"step": 40, "epoch": 2, "split": "valid", "loss": 0.6, "auroc": auroc, "macro_f1": 0.7}


def _screen(out: StringIO, *, terminal: bool, start_step: int = 0) -> ConsoleTracker:
    console = Console(file=out, force_terminal=terminal, width=140, highlight=False)
    return ConsoleTracker(console, total_steps=100, num_epochs=5, start_step=start_step)


def test_a_terminal_shows_a_bar_with_all_there_is_to_know(caplog: pytest.LogCaptureFixture) -> None:
    out = StringIO()
    screen = _screen(out, terminal=True, start_step=20)
    screen.log(_train(40))
    screen.log(_valid())
    screen.close()
    screen.close()
    shown = out.getvalue()
    for text in ("epoch 2/5", "40/100", "loss 0.5123", "lr 1.00e-03", "1,000 rows/s", "left 0:06"):
        assert text in shown
    assert "valid loss 0.6000  auroc 0.8000  macro-F1 0.7000" in shown
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is back"
    assert caplog.records == []


def test_a_pipe_gets_plain_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    caplog.set_level(logging.INFO, "dist_train")
    out = StringIO()
    screen = _screen(out, terminal=False)
    screen.log(_train(40))
    screen.log(_valid(auroc=None))
    screen.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "epoch 2/5  step 40/100  loss 0.5123  lr 1.00e-03  1,000 rows/s  left 0:06",
        "epoch 2/5  step 40  valid loss 0.6000  auroc -  macro-F1 0.7000  best so far",
    ]
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("rate", "left"), [(None, "- rows/s  left -:--"), (1.0, "left 1:40:00"), (100.0, "left 1:00"), (1e9, "left 0:00")]
)
def test_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, rate: float | None, left: str
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    caplog.set_level(logging.INFO, "dist_train")
    screen = _screen(StringIO(), terminal=False)
    screen.log(_train(40, rate))
    assert caplog.records[0].getMessage().endswith(left)


def test_the_best_validation_so_far_is_marked(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    caplog.set_level(logging.INFO, "dist_train")
    console = Console(file=StringIO(), force_terminal=False, width=140)
    screen = ConsoleTracker(console, total_steps=100, num_epochs=5, start_step=20, best_value=0.7)
    for loss in (0.75, 0.6, 0.6, 0.59):
        screen.log(_valid() | {"loss": loss})
    assert [record.getMessage().endswith("best so far") for record in caplog.records] == [False, True, False, True]


def test_the_best_is_marked_by_the_metric_that_chooses(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    caplog.set_level(logging.INFO, "dist_train")
    console = Console(file=StringIO(), force_terminal=False, width=140)
    screen = ConsoleTracker(
        console, total_steps=100, num_epochs=5, start_step=0, selection=Selection("accuracy", higher_is_better=True)
    )
    for loss, accuracy in ((0.5, 0.7), (0.4, 0.6), (0.6, 0.8)):
        screen.log(_valid() | {"loss": loss, "accuracy": accuracy})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.endswith("best so far") for line in lines] == [True, False, True]
    assert "accuracy 0.8000" in lines[-1]


class _Terminal(StringIO):
    connected = True

    def write(self, text: str) -> int:
        if not self.connected:
            raise OSError(5, "Input/output error")
        return super().write(text)

    def flush(self) -> None:
        self.write("")


def test_a_terminal_that_has_gone_is_no_reason_to_stop() -> None:
    out = _Terminal()
    screen = _screen(out, terminal=True)
    screen.log(_train(40))
    out.connected = False
    shown = out.getvalue()
    assert "step" in shown
    screen.log(_train(50))
    screen.log(_valid())
    screen.close()
    assert out.getvalue() == shown
