"""Whole jobs that are audited: their bits are those of jobs that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny_bert import write_texts, write_tiny_bert
from tests.resume.jobs import Trap, finish, run_job, tiny_job, write_table
from tests.same_bits.test_text import EXACT
from tests.tasks.text_jobs import needs_text_libraries, text_job

AUDIT = "runtime.audit_every_steps=2"


@pytest.mark.slow
def test_a_job_is_the_same_bits_audited_after_a_kill_and_on_two_ranks(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.csv")
    alone, killed = (tiny_job(table, tmp_path / name, "train.virtual_ranks=4") for name in ("alone", "killed"))
    assert run_job([*killed, AUDIT], 2, Trap(step=11)).killed
    assert finish([*killed, AUDIT], 2) == finish(alone)


@pytest.mark.slow
@needs_text_libraries
def test_adapters_are_the_same_bits_audited_after_a_kill_and_on_two_ranks(tmp_path: Path) -> None:
    place = write_tiny_bert(tmp_path / "bert"), write_texts(tmp_path / "texts.csv", 90)
    alone, killed = (text_job(*place, tmp_path / name, *EXACT) for name in ("alone", "killed"))
    assert run_job([*killed, AUDIT], 2, Trap(step=7)).killed
    assert finish([*killed, AUDIT], 2) == finish(alone)
