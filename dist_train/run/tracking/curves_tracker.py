"""Curves of a run as a picture in its folder. Training never depends on it: any failure here is one warning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from dist_train.system.console import log
from dist_train.system.files import write_atomically

_MOST_PANELS = 4
_PREFERRED = ("loss", "auroc", "accuracy", "macro_f1")


class CurvesTracker:
    """Draws `curves.png` in the run folder after each evaluation: the metrics of validation and training rows by step.

    What metrics.jsonl has of former starts is drawn too.
    """

    def __init__(self, *, metrics_file: Path, enabled: bool) -> None:
        self._file = metrics_file.with_name("curves.png")
        self._points: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self._enabled = enabled
        if enabled and metrics_file.exists():
            with metrics_file.open("rb") as lines:
                for line in lines:
                    self._add(json.loads(line))

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a line of metrics; draw where it is one of an evaluation."""
        if not self._enabled:
            return
        try:
            self._add(record)
            if record["split"] != "train":
                write_atomically(self._file, self._drawn())
        except ImportError:
            self._enabled = False
            log.warning('matplotlib is not installed: log.curves has no effect: pip install "dist_train[report]"')
        except Exception as error:
            self._enabled = False
            log.warning("curves.png failed (%s): training goes on without it", type(error).__name__)

    def _add(self, record: Mapping[str, Any]) -> None:
        for name in _PREFERRED:
            if isinstance(record.get(name), (int, float)):
                points = self._points.setdefault(name, {}).setdefault(record["split"], [])
                points.append((record["step"], record[name]))

    def _drawn(self) -> bytes:
        from matplotlib.figure import Figure  # here: it takes a second

        names = [name for name in _PREFERRED if "valid" in self._points.get(name, {})][:_MOST_PANELS]
        figure = Figure(figsize=(5.0 * max(1, len(names)), 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
            for split, points in self._points[name].items():
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=split, marker="o" if len(points) == 1 else None)
            axes.set(title=name, xlabel="step")
            axes.legend(frameon=False)
        stream = BytesIO()
        figure.savefig(stream, format="png", dpi=110)
        return stream.getvalue()
