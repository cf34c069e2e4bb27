"""What may change between two starts of one run."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from dist_train.config.compatibility import differences
from dist_train.config.load import load_config
from dist_train.config.schema import JobConfig

BASE = asdict(JobConfig())


def changed(*arguments: str) -> tuple[list[str], list[str]]:
    return differences(BASE, asdict(load_config(arguments)))


def test_nothing_changed_is_nothing_said() -> None:
    assert changed() == ([], [])


HARMLESS = [
    "run.name=x", "run.dir=x", "run.resume=never", "run.force=true", "data.path=x.csv", "train.epochs=7",
    "train.max_steps=7", "train.early_stopping_patience=7", "evaluation.batch_size=7", "checkpoint.keep=7",
    "runtime.timeout_seconds=7", "log.every_steps=7", "wandb.mode=disabled",
]  # fmt: skip
HARMFUL = [
    "run.seed=7", "data.target=x", "data.drop=[x]", "data.missing_values=[x]", "data.split_column=x",
    "model.hidden_dim=8", "model.dropout=0", "model.embedding_dim=4", "optim.lr=7", "optim.betas=[0.5,0.5]",
    "schedule.warmup_steps=7", "train.global_batch_size=7", "train.accumulation_steps=2", "train.precision=float64",
    "train.class_weights=balanced", "train.label_smoothing=0.1", "train.ema_decay=0.9",
]  # fmt: skip


@pytest.mark.parametrize("argument", HARMLESS)
def test_what_a_run_may_change_when_it_goes_on_is_harmless(argument: str) -> None:
    incompatible, compatible = changed(argument)
    assert incompatible == []
    assert [line.partition(":")[0] for line in compatible] == [argument.partition("=")[0]]


@pytest.mark.parametrize("argument", HARMFUL)
def test_what_changes_a_step_is_harmful(argument: str) -> None:
    incompatible, compatible = changed(argument)
    assert compatible == []
    assert [line.partition(":")[0] for line in incompatible] == [argument.partition("=")[0]]


def test_a_line_says_what_was_and_what_is() -> None:
    assert changed("optim.lr=0.5", "train.epochs=3") == (
        ["optim.lr: was 0.001, is 0.5"],
        ["train.epochs: was 20, is 3"],
    )


def test_a_key_that_came_or_went_is_a_difference() -> None:
    """As after an upgrade: an older checkpoint lacks a key."""
    without = {name: dict(values) for name, values in BASE.items()}
    del without["optim"]["eps"]
    assert differences(without, BASE)[0] == ["optim.eps: was None, is 1e-08"]
    assert differences(BASE, without)[0] == ["optim.eps: was 1e-08, is None"]


def test_every_key_is_compared() -> None:
    other = {section.name: dict.fromkeys(BASE[section.name], "changed") for section in fields(JobConfig)}
    incompatible, compatible = differences(BASE, other)
    assert len(incompatible) + len(compatible) == sum(len(values) for values in BASE.values())
