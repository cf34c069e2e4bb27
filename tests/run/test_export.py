"""What the end of a run says of its result."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dist_train.run.export import _warn_of_base_rate
from tests.resume.jobs import run_job, tiny_job, write_table


@pytest.mark.parametrize(
    ("loss", "rows", "warned"),
    [(0.6, (10, 10), False), (0.7, (10, 10), True), (0.6, (19, 1), True), (0.19, (19, 1), False), (0.0, (5, 0), True)],
)
def test_a_result_no_better_than_the_base_rate_is_said_in_words(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, loss: float, rows: tuple[int, int], warned: bool
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    per_class = {name: {"rows": count} for name, count in zip("ab", rows, strict=True)}
    _warn_of_base_rate("test", {"loss": loss, "per_class": per_class})
    assert ["no better than the base rate" in record.getMessage() for record in caplog.records] == [True] * warned


def test_rank_0_alone_says_so(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    ended = run_job(tiny_job(table, tmp_path / "run", "train.max_steps=1", "optim.lr=1e-9"), 2)
    assert ended.codes == [0, 0], ended.errors
    assert ["no better than the base rate" in lines for lines in ended.errors] == [True, False]


def test_metrics_without_classes_have_no_base_rate(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_base_rate("test", {"loss": 99.0})
    assert caplog.records == []
