"""The exact mode's promise for low-rank adapters of a Transformer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny_bert import write_texts, write_tiny_bert
from tests.ranks import preload
from tests.resume.jobs import Trap, finish, folder_of, outcome, run_job
from tests.tasks.text_jobs import needs_text_libraries, text_job

pytestmark = needs_text_libraries
preload("tests.models.text_libraries")


def test_adapters_are_the_same_bits_on_any_number_of_ranks_and_after_a_kill(tmp_path: Path) -> None:
    bert, texts = write_tiny_bert(tmp_path / "bert"), write_texts(tmp_path / "texts.csv", 90)
    # 63 training rows: the last batch of an epoch is ragged, and some of its slices are empty.
    more = ("train.virtual_ranks=4", "train.max_steps=9", "train.accumulation_steps=2", "train.ema_decay=0.9")

    def job(name: str) -> list[str]:
        return text_job(bert, texts, tmp_path / name, *more, "checkpoint.every_steps=3", "log.every_steps=1")

    alone = finish(job("alone"))
    killed = job("killed")
    assert run_job(killed, 2, Trap(step=7)).killed
    assert run_job(killed, 4).codes == [0] * 4
    assert outcome(folder_of(killed)) == alone


@pytest.mark.slow
def test_the_fast_mode_agrees_to_rounding(tmp_path: Path) -> None:
    bert, texts = write_tiny_bert(tmp_path / "bert"), write_texts(tmp_path / "texts.csv", 90)
    more = ("train.precision=float64", "train.max_steps=6", "log.every_steps=1")
    one, two = (finish(text_job(bert, texts, tmp_path / str(n), *more), n) for n in (1, 2))
    for ours, theirs in zip(one["lines"], two["lines"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-9)
