"""Small jobs of texts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.in_process import CommandResult

needs_text_libraries = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("peft") is None, reason="transformers or peft is absent"
)

_SMALL = (
    "data.target=label",
    "text.sort_batches=3",
    "train.global_batch_size=16",
    "optim.lr=0.01",
    "schedule.warmup_steps=2",
    "runtime.device=cpu",
    "wandb.mode=disabled",
)
SMALL_TEXT_JOB = (
    "task.name=text",
    "model.name=transformer",
    "model.transformer.lora_rank=2",
    "model.transformer.lora_dropout=0.1",
    "text.max_tokens=22",
    *_SMALL,
)
SMALL_INSTRUCTION_JOB = (
    "task.name=instruction",
    "model.name=causal_lm",
    "model.causal_lm.lora_rank=2",
    "model.causal_lm.lora_dropout=0.1",
    "model.causal_lm.instruction=how {text}",
    "text.max_tokens=28",
    *_SMALL,
)


def text_job(bert: Path, texts: Path, run: Path, *more: str) -> list[str]:
    """Arguments of a small job of texts, in the order that `tests.resume.jobs.folder_of` relies on."""
    place = [f"data.path={texts}", f"run.dir={run.parent}", f"run.name={run.name}"]
    return [*place, f"model.transformer.pretrained={bert}", *SMALL_TEXT_JOB, *more]


def instruction_job(llama: Path, texts: Path, run: Path, *more: str) -> list[str]:
    """Arguments of a small job of instructions, in the same order."""
    place = [f"data.path={texts}", f"run.dir={run.parent}", f"run.name={run.name}"]
    return [*place, f"model.causal_lm.pretrained={llama}", *SMALL_INSTRUCTION_JOB, *more]


def refused(result: CommandResult, *words: str) -> None:
    """The command ended with exit code 2 and one line, which has these words."""
    assert result.code == 2, result.err
    last = result.err.strip().splitlines()[-1]
    assert "Traceback" not in result.err
    for word in words:
        assert word in last
