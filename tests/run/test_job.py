"""What a job makes its ranks do together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.load import load_config, read_config
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World, process_group
from dist_train.errors import TrainingFault
from dist_train.execution.recorded import GpuExecution
from dist_train.run import job, session
from dist_train.run.job import train
from dist_train.training.loop import Loop
from tests.execution.test_recorded import Repeated, Repeater
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


def test_values_that_follow_from_the_table_are_planned_written_and_found_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run folder has numbers, so that a run continues with them; a larger table would be another run."""
    run = tmp_path / "run"
    arguments = [*tiny_job(write_table(tmp_path / "table.csv"), run), "train.global_batch_size=auto"]
    caplog.set_level(logging.INFO, "dist_train")
    train(load_config([*arguments, "train.max_steps=4"]), World(), {})
    config = read_config(run / "config.yaml")
    assert config.task.auto == []
    assert f"auto       train.global_batch_size={config.train.global_batch_size}" in caplog.text
    summary = train(load_config([*arguments, "train.max_steps=8"]), World(), {})
    assert summary is not None
    assert summary["steps"] == 8
    assert read_config(run / "config.yaml") == replace(config, train=replace(config.train, max_steps=8))


@pytest.mark.parametrize(
    "failure", [None, TrainingFault("not finite"), RuntimeError("a fault of the program")], ids=str
)
def test_recorded_steps_are_freed_before_the_process_group_goes(
    failure: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL waits for graphs that refer to it; the traceback of a failure on its way holds on to everything."""
    events: list[str] = []
    recorder, choose = Repeater(), session.choose_execution

    @contextmanager
    def group(*arguments: Any) -> Iterator[Any]:
        with process_group(*arguments) as store:
            try:
                yield store
            finally:
                events.append("the process group goes")

    def log(*_: Any) -> None:
        assert recorder.runs, "a step was recorded by then"
        if failure is not None:
            raise failure

    monkeypatch.setattr(Repeated, "reset", lambda _: events.append("a graph is freed"))
    monkeypatch.setattr(
        session, "choose_execution", lambda *a, **b: GpuExecution(choose(*a, **b), recorder, rows_on_device=True)
    )
    monkeypatch.setattr(job, "process_group", group)
    monkeypatch.setattr(Loop, "_log", log)
    more = ("train.accumulation_steps=1", "train.max_steps=40", "log.every_steps=30", "train.epochs=40")
    arguments = tiny_job(write_table(tmp_path / "table.csv"), tmp_path / "run", *more)
    with suppress(TrainingFault, RuntimeError):
        train(load_config(arguments), World(), {})
    assert events[0] == "a graph is freed"
    assert events[-1] == "the process group goes"
