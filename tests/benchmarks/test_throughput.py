"""The comparison at several batch sizes: who cannot take part is left out, and it is said why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import array_peers, contestants, throughput, workload
from benchmarks.report import Report


def test_a_peer_that_cannot_run_takes_no_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: object) -> Callable[[float], float]:
        raise ImportError("it needs another version\nof something")

    def breaks_at_256(*arguments: object) -> Callable[[float], float]:
        if arguments[2] == 256:
            raise RuntimeError("out of memory")
        return lambda _seconds: 100.0

    monkeypatch.setattr(workload, "NUM_ROWS", 2048)
    monkeypatch.setattr(array_peers, "jax_epoch", refuses)
    monkeypatch.setattr(array_peers, "scikit_learn", breaks_at_256)
    for name in ("tutorial", "lightning", "accelerate"):
        monkeypatch.setattr(contestants, name, lambda *_: lambda _seconds: 50.0)
    report = Report()
    throughput.compare(report, torch.device("cpu"), (1024, 256), rounds=1, seconds=0.02)
    first, second = report.sections["throughput_cpu"]
    assert set(first["ratio"]) == {"tutorial", "Lightning", "Accelerate", "scikit-learn"}
    assert set(second["ratio"]) == {"tutorial", "Lightning", "Accelerate"}
    said = capsys.readouterr().out
    assert said.count("JAX takes no part: ImportError: it needs another version") == 2
    assert "scikit-learn takes no part: RuntimeError: out of memory" in said
