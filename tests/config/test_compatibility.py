"""What may change between two starts of one run."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_train.config import compatibility
from dist_train.config.compatibility import differences
from dist_train.config.load import load_config
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "v1"

BASE = asdict(JobConfig())


def changed(*arguments: str) -> tuple[list[str], list[str]]:
    return differences(BASE, asdict(load_config(arguments)))


def test_nothing_changed_is_nothing_said() -> None:
    assert changed() == ([], [])


HARMLESS = [
    "run.name=x", "run.dir=x", "run.resume=never", "run.force=true", "data.path=x.csv", "train.epochs=7",
    "train.max_steps=7", "train.early_stopping_patience=7", "train.select_by=auroc", "evaluation.batch_size=7",
    "checkpoint.keep=7",
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


def _without(key: str) -> dict[str, Any]:
    section, name = key.split(".")
    return {s: {n: v for n, v in values.items() if (s, n) != (section, name)} for s, values in BASE.items()}


def test_a_key_that_an_old_checkpoint_lacks_had_its_first_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an upgrade: `optim.eps` came with a later version, and its first default was 1e-6."""
    monkeypatch.setitem(compatibility.ADDED, "optim.eps", 1e-6)
    old = _without("optim.eps")
    assert differences(old, BASE) == (["optim.eps: was 1e-06, is 1e-08"], [])
    now = asdict(load_config(["optim.eps=1e-6"]))
    assert differences(old, now) == ([], [])


def test_a_renamed_key_is_compared_under_its_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compatibility.RENAMED, "optim.epsilon", "optim.eps")
    monkeypatch.setitem(compatibility.RENAMED, "adam.betas", "optim.betas")
    old = _without("optim.eps")
    old["optim"]["epsilon"] = 1e-8
    old["adam"] = {"betas": old["optim"].pop("betas")}
    assert differences(old, BASE) == ([], [])
    old["optim"]["epsilon"] = 1e-5
    assert differences(old, BASE) == (["optim.eps: was 1e-05, is 1e-08"], [])


@pytest.mark.parametrize(
    ("argument", "key", "was"),
    [
        ("train.class_weights=balanced", "train.select_by", "loss"),
        ("train.loss=own", "train.select_by", "loss"),
        ("train.ema_decay=0.99", "train.ema_warmup", False),
    ],
)
def test_a_run_of_before_keeps_what_it_was_trained_with(argument: str, key: str, was: Any) -> None:
    now = asdict(load_config([argument]))
    before = {section: dict(values) for section, values in now.items()}
    del before["train"]["select_by"], before["train"]["ema_warmup"]
    section, name = key.split(".")
    assert compatibility.migrated(before)[section][name] == was
    incompatible, compatible = differences(before, now)
    assert [line.partition(":")[0] for line in (*incompatible, *compatible)] == [key]
    plain = {section: dict(values) for section, values in BASE.items()}
    del plain["train"]["select_by"], plain["train"]["ema_warmup"]
    assert differences(plain, BASE) == ([], [])
    config, changed = compatibility.as_begun(load_config([argument]), before)
    assert changed == [f"{key}={was}"]
    assert differences(before, asdict(config)) == ([], [])
    assert compatibility.as_begun(config, asdict(config)) == (config, [])
    assert compatibility.as_begun(JobConfig(), plain) == (JobConfig(), [])


def test_a_key_of_a_newer_version_is_a_difference() -> None:
    newer = {name: dict(values) for name, values in BASE.items()}
    newer["optim"]["nesterov"] = True
    assert differences(newer, BASE) == (["optim.nesterov: was True, and this version has no such key"], [])


def test_every_key_that_the_first_format_lacks_has_the_default_of_its_introduction() -> None:
    """tests/golden/v1 holds a configuration of the first format with all of its keys."""
    first = yaml.safe_load((GOLDEN / "runs" / "fast" / "config.yaml").read_text())
    keys = {f"{section}.{name}" for section, values in first.items() for name in values}
    keys = {compatibility.RENAMED.get(key, key) for key in keys} | set(compatibility.ADDED)
    assert {f"{section}.{name}" for section, values in BASE.items() for name in values} <= keys


@pytest.mark.parametrize("version", [0, compatibility.FORMATS["checkpoint"] + 1, "two", None])
def test_a_format_that_is_not_known_is_refused_by_number(version: Any) -> None:
    compatibility.require_format("checkpoint", compatibility.FORMATS["checkpoint"], "here")
    supported = compatibility.FORMATS["checkpoint"]
    expected = (
        f"here: is a checkpoint of format {version}; this version of dist_train reads the formats 1 to {supported}"
    )
    with pytest.raises(UserError, match=expected):
        compatibility.require_format("checkpoint", version, "here")


def test_every_key_is_compared() -> None:
    other = {section.name: dict.fromkeys(BASE[section.name], "changed") for section in fields(JobConfig)}
    incompatible, compatible = differences(BASE, other)
    assert len(incompatible) + len(compatible) == sum(len(values) for values in BASE.values())
