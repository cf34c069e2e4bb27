"""Progress of a run for people: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dist_train.system.console import log
from dist_train.training.selection import Selection


class ConsoleTracker:
    """Shows each record; on a terminal training lines move a bar, and validation lines stay above it.

    The best validation so far is marked, by the metric of `selection`; `best_value` is that of the steps up to
    `start_step`.
    """

    def __init__(
        self,
        console: Console,
        *,
        total_steps: int,
        num_epochs: int,
        start_step: int,
        best_value: float | None = None,
        selection: Selection = Selection(),  # noqa: B008  (immutable)
    ) -> None:
        self._console = console
        self._total_steps = total_steps
        self._num_epochs = num_epochs
        self._best_value = best_value
        self._selection = selection
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            console.file = cast(IO[str], _ErrorTolerantStream(console.file))
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}  {task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left {task.fields[left]}"),
                console=console,
            )
            self._task = self._bar.add_task(
                "train", total=total_steps, completed=start_step, epoch=f"-/{num_epochs}", detail="", left="-:--"
            )
            self._bar.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Show a line of metrics."""
        if record["split"] == "train":
            self._show_training(record)
        else:
            self._show(self._evaluation_line(record))

    def close(self) -> None:
        """Stop the progress bar and restore the cursor. A second call does nothing."""
        if self._bar is not None:
            self._bar.stop()

    def _show_training(self, record: Mapping[str, Any]) -> None:
        rate = record["samples_per_second"]
        rows_left = record["samples"] / record["step"] * (self._total_steps - record["step"])
        left = _clock(rows_left / rate) if rate else "-:--"
        speed = f"{rate:,.0f}" if rate else "-"
        detail = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {speed} rows/s"
        epoch = f"{record['epoch']}/{self._num_epochs}"
        if self._bar is None:
            log.info("epoch %s  step %d/%d  %s  left %s", epoch, record["step"], self._total_steps, detail, left)
        else:
            self._bar.update(self._task, completed=record["step"], epoch=epoch, detail=detail, left=left)

    def _evaluation_line(self, record: Mapping[str, Any]) -> str:
        epoch = f"epoch {record['epoch']}/{self._num_epochs}"
        best = False
        if record["split"] == "valid":
            value = self._selection.value(record)
            best = self._selection.betters(value, self._best_value)
            self._best_value = value if best else self._best_value
        scores = describe_scores(record, self._selection.metric)
        return f"{epoch}  step {record['step']}  {record['split']} {scores}{'  best so far' * best}"

    def _show(self, line: str) -> None:
        if self._bar is None:
            log.info("%s", line)
        else:
            self._console.print(line, soft_wrap=True)


def describe_scores(metrics: Mapping[str, Any], selected_by: str = "loss") -> str:
    """The metrics of a split that fit on a line, and the one that chooses the best step."""
    names = {"loss": "loss", "auroc": "auroc", "macro_f1": "macro-F1"}
    names |= {} if selected_by in names else {selected_by: selected_by}
    shown = {label: metrics[name] for name, label in names.items() if name in metrics}
    return "  ".join(f"{label} {'-' if value is None else f'{value:.4f}'}" for label, value in shown.items())


class _ErrorTolerantStream:
    """A stream that ignores write errors: a terminal whose connection is lost must not end training."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
