"""What a job makes its ranks do together."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.config.load import load_config
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.job import train
from tests.resume.jobs import tiny_job, write_table


def test_a_line_of_metrics_costs_no_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []
    on_rank_zero = Collectives.on_rank_zero

    def counted(self: Collectives, make: object) -> object:
        phases.append(self.heartbeat.read().phase)
        return on_rank_zero(self, make)  # type: ignore[arg-type]

    monkeypatch.setattr(Collectives, "on_rank_zero", counted)
    arguments = tiny_job(write_table(tmp_path / "table.csv"), tmp_path / "run", "train.epochs=1", "log.every_steps=1")
    train(load_config(arguments), World(), {})
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > 5
    assert "training" not in phases
    assert "checkpointing" in phases
