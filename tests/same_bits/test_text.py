"""The exact mode's promise for low-rank adapters of a Transformer, an encoder and a causal language model."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.models.tiny_bert import write_texts, write_tiny_bert
from tests.models.tiny_llama import write_tiny_llama
from tests.ranks import preload
from tests.resume.jobs import Trap, finish, folder_of, run_job
from tests.tasks.text_jobs import instruction_job, needs_text_libraries, text_job

pytestmark = needs_text_libraries
preload("tests.models.text_libraries")

JobOf = Callable[..., list[str]]

# 63 training rows: the last batch of an epoch is ragged, and some of its slices are empty.
EXACT = (
    "train.virtual_ranks=4",
    "train.max_steps=9",
    "train.accumulation_steps=2",
    "text.tokens_per_pass=150",
    "train.ema_decay=0.9",
    "checkpoint.every_steps=3",
    "log.every_steps=1",
)


@pytest.fixture(scope="module", params=["encoder", "causal"])
def job_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> JobOf:
    """Run folder and more arguments -> the arguments of a job on a tiny model."""
    folder = tmp_path_factory.mktemp("texts")
    texts = write_texts(folder / "texts.csv", 90)
    if request.param == "encoder":
        return partial(text_job, write_tiny_bert(folder / "bert"), texts)
    return partial(instruction_job, write_tiny_llama(folder / "llama"), texts)


def test_adapters_are_the_same_bits_after_a_kill_and_on_another_number_of_ranks(job_of: JobOf, tmp_path: Path) -> None:
    alone, killed = (job_of(tmp_path / name, *EXACT) for name in ("alone", "killed"))
    assert run_job(killed, 2, Trap(step=7)).killed
    assert finish(killed, 2) == finish(alone)
    adapters = [(folder_of(job) / "model" / "adapter_model.safetensors").read_bytes() for job in (alone, killed)]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_adapters_are_the_same_bits_on_any_number_of_ranks(job_of: JobOf, tmp_path: Path) -> None:
    outcomes = [finish(job_of(tmp_path / str(ranks), *EXACT), ranks) for ranks in (1, 2, 4)]
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.slow
@pytest.mark.parametrize("trap", [Trap(step=6), Trap(step=6, signal=signal.SIGTERM, rank=1)], ids=["kill", "term"])
@pytest.mark.parametrize("more", [EXACT, ("train.max_steps=9", "checkpoint.every_steps=3")], ids=["exact", "fast"])
def test_a_run_that_is_stopped_in_mid_epoch_ends_with_the_same_bits(
    trap: Trap, more: tuple[str, ...], job_of: JobOf, tmp_path: Path
) -> None:
    whole, stopped = (job_of(tmp_path / name, *more, "text.sort_batches=1") for name in ("whole", "stopped"))
    ended = run_job(stopped, 2, trap)
    assert ended.killed if not trap.signal else ended.codes == [0, 0], ended.errors
    assert not (folder_of(stopped) / "summary.json").exists()
    assert finish(stopped, 2) == finish(whole, 2)
    adapters = [(folder_of(job) / "model" / "adapter_model.safetensors").read_bytes() for job in (whole, stopped)]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_the_fast_mode_agrees_to_rounding(job_of: JobOf, tmp_path: Path) -> None:
    more = ("train.precision=float64", "train.max_steps=6", "log.every_steps=1")
    one, two = (finish(job_of(tmp_path / str(n), *more), n) for n in (1, 2))
    for ours, theirs in zip(one["lines"], two["lines"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-9)
