"""What the file of results says, and on a GPU what is one launch; a stand-in replaces the GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import limits, report
from benchmarks.report import Report


def test_results_of_a_gpu_name_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "describe_machine", lambda device: {"device": device.type})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Report().close(tmp_path / "results" / "bench.json")
    written = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert written["machine"] == {"device": "cpu"}
    assert written["gpu_machine"] == {"device": "cuda"}


class Recorder:
    """Counts what is recorded and launched."""

    launches = 0

    def use_stream(self) -> None:
        pass

    def record(self, launch: Callable[[], None]) -> Any:
        launch()

        class Recording:
            def replay(self) -> None:
                Recorder.launches += 1

        return Recording()


def test_products_of_a_gpu_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[int, ...]] = []
    monkeypatch.setattr(limits, "CudaRecorder", Recorder)
    monkeypatch.setattr(limits, "wait_for", lambda _: None)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.ones(shape))
    monkeypatch.setattr(torch, "mm", lambda _a, _b, out: products.append(tuple(out.shape)))
    rows_per_second = limits.network_products(32, torch.device("cuda"))(0.01)
    assert rows_per_second > 0
    assert len(products) == 2 * 8, "once to warm up, once to be recorded"
    assert Recorder.launches > 0
