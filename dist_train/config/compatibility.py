"""Artefacts and configurations of other versions, and the keys that a run may change when it resumes.

Checkpoints and trained models carry a format number; one that carries none is of format 1. A version reads every
format up to its own. A configuration has no number: its keys are read through `RENAMED` and `ADDED`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import is_dataclass, replace
from typing import Any

from dist_train.config import families
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError

FORMATS = {
    "checkpoint": 2,
    "trained model": 2,
    "ensemble": 1,
    "tabular task": 2,
    "text task": 1,
    "instruction task": 1,
    "feature spec": 3,
    "classifier": 1,
    "calibration": 1,
    "report": 1,
    "witness.jsonl": 1,
}
"""The format that this version writes, by kind of artefact."""

RENAMED: dict[str, str] = {}
"""Former name of a key -> its name now, both as `section.key`. A former name is read wherever a key is."""


def _selected_before(tree: Mapping[str, Any]) -> str | None:
    """`train.select_by` of a run of before: the log loss, also where the loss that was trained is another one."""
    train = tree["train"]  # of a trained model it has few keys
    another = train.get("class_weights") is not None or train.get("loss", "cross_entropy") != "cross_entropy"
    return "loss" if another else None


def _warmed_up_before(tree: Mapping[str, Any]) -> bool:
    """`train.ema_warmup` of a run of before: a moving average was not."""
    return tree["train"].get("ema_decay") is None


ADDED: dict[str, Any] = {
    "task.name": "tabular",
    "task.auto": [],
    "train.loss": "cross_entropy",
    "evaluation.metrics": [],
    "data.split_seed": None,
    "data.numeric_transform": "robust",
    "data.hash_buckets": 0,
    "data.time_column": None,
    "data.group_column": None,
    "data.folds": None,
    "data.fold": None,
    "ensemble.seeds": 1,
    "data.weight": None,
    "schedule.name": "cosine",
    "schedule.plateau_patience": 3,
    "schedule.plateau_factor": 0.3,
    "train.select_by": _selected_before,
    "train.class_sampling": None,
    "train.ema_warmup": _warmed_up_before,
    "data.formats": {},
    "log.tensorboard": False,
    "log.mlflow": False,
    "log.curves": False,
    "calibration.method": "none",
    "calibration.apply": True,
    "report.enabled": False,
    "report.positive_class": None,
    "report.segments": [],
    "report.dependence": [],
    "report.false_positive_cost": 1.0,
    "report.false_negative_cost": 1.0,
    "report.bootstrap_repeats": 200,
    "runtime.products": lambda _: "library",
    "text.column": "text",
    "text.hub_dataset": None,
    "text.max_tokens": 128,
    "text.pad_to_multiple": 8,
    "text.sort_batches": 16,
    "text.tokens_per_pass": None,
    "text.baselines": False,
    "runtime.fsdp": False,
    "runtime.audit_every_steps": None,
    "train.gradient_checkpointing": False,
}
"""Key that came after format 1 -> what a run that lacks it was trained with: the key's first default, or a function of
the configuration that gives it."""

ADDED_TO_FAMILIES: dict[str, Any] = {"numeric_bins_by": "quantiles"}
"""The same for keys of `families.FeatureKeys`, which each block that has `numeric_embedding` got."""

REDEFINED_METRICS = {"brier": (2, 2, "of two classes it is now scikit-learn's brier_score_loss, half of what it was")}
"""Metric -> (first format with its present definition, number of classes that it changed for, the change in words)."""

# Keys that a run may change when it resumes: paths, output, length, which of its weights are best, and what
# is made of its probabilities. They do not
# affect the model, the data, their order or anything else that a step takes from the configuration, with one exception:
# train.epochs and train.max_steps stretch the cosine, and with it the learning rate of later steps, which is what
# somebody who asks for more epochs wants. evaluation.* can change which weights count as best, and with
# train.early_stopping_patience where the run ends; runtime.* can change how sums are rounded. data.path is among them
# because the content of the file is compared instead.
_COMPATIBLE = (
    "run.name", "run.dir", "run.resume", "run.force", "run.time_limit_minutes", "data.path", "train.epochs",
    "train.max_steps", "train.early_stopping_patience", "train.select_by", "train.gradient_checkpointing",
    "evaluation.", "checkpoint.", "runtime.", "log.", "wandb.", "calibration.", "report.", "text.hub_dataset",
    "text.baselines",
)  # fmt: skip


# Keys that no result depends on: names, places, patience, output, and what is computed to the same bits. All of
# runtime.* is among them but runtime.products.
_WITHOUT_RESULT = (
    "run.name", "run.dir", "run.resume", "run.force", "run.time_limit_minutes", "data.path", "text.hub_dataset",
    "text.baselines", "train.gradient_checkpointing", "checkpoint.keep", "runtime.", "log.tensorboard", "log.mlflow",
    "log.curves", "report.", "wandb.",
)  # fmt: skip


def require_format(kind: str, number: Any, source: str) -> None:
    """Raises UserError where this version does not read artefacts of this kind and format number."""
    supported = FORMATS[kind]
    if not isinstance(number, int) or not 1 <= number <= supported:
        raise UserError(
            f"{source}: is a {kind} of format {number}; this version of dist_train reads the formats 1 to {supported}: "
            "use the version that wrote it"
        )


def redefined_metrics(number: int, num_classes: int) -> dict[str, str]:
    """Metrics whose definition has changed since artefacts of this format number, with the change in words."""
    return {
        name: words
        for name, (first, classes, words) in REDEFINED_METRICS.items()
        if number < first and num_classes == classes
    }


def with_renamed_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested configuration in which former names of keys are replaced by those of now."""
    copy = deepcopy(dict(tree))
    for former, name in RENAMED.items():
        section, _, key = former.partition(".")
        values = copy.get(section)
        if not isinstance(values, dict) or key not in values:
            continue
        value = values.pop(key)
        if not values:
            del copy[section]
        section, _, key = name.partition(".")
        copy.setdefault(section, {}).setdefault(key, value)
    return copy


def migrated(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of an older run, with the keys of now: renamed, and added with their first default."""
    copy = with_renamed_keys(tree)
    for name, default in ADDED.items():
        section, _, key = name.partition(".")
        copy.setdefault(section, {}).setdefault(key, default(copy) if callable(default) else default)
    for block in copy.get("model", {}).values():
        if isinstance(block, dict) and "numeric_embedding" in block:
            for key, former in ADDED_TO_FAMILIES.items():
                block.setdefault(key, former)
    return copy


def as_begun(config: JobConfig, begun: Mapping[str, Any]) -> tuple[JobConfig, list[str]]:
    """The configuration with which a run goes on that was begun by an earlier version, and the keys that were changed.

    `begun` is its resolved configuration, as it was written. A key that it lacks, whose former value is a function of
    that configuration, gets this value, unless `config` says otherwise than its default.
    """
    before, default, changed = migrated(begun), JobConfig(), []
    for name, former in ADDED.items():
        section, _, key = name.partition(".")
        if not callable(former) or key in begun.get(section, {}):
            continue
        values = getattr(config, section)
        if getattr(values, key) == getattr(getattr(default, section), key) != before[section][key]:
            config = replace(config, **{section: replace(values, **{key: before[section][key]})})
            changed.append(f"{name}={before[section][key]}")
    return config, changed


def unknown_keys(tree: Mapping[str, Any]) -> list[str]:
    """Keys of a nested configuration that this version does not have, as `section.key`."""
    known = families.complete_config([tree])
    return sorted(
        f"{section}.{name}"
        for section, values in tree.items()
        if isinstance(values, Mapping)
        for name in values
        if not hasattr(getattr(known, section, None), name)
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Differing keys of two resolved configurations as `key: was A, is B`: the incompatible, then the compatible ones.

    `before` may be of an older version.
    """
    old, new = dict(_flat(migrated(before))), dict(_flat(now))
    incompatible: list[str] = []
    compatible: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            line = f"{key}: was {old[key]!r}, and this version has no such key"
        elif old.get(key) != new[key]:
            line = f"{key}: was {old.get(key)!r}, is {new[key]!r}"
        else:
            continue
        (compatible if key.startswith(_COMPATIBLE) else incompatible).append(line)
    return incompatible, compatible


def settings_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration, of an older version as well, without the keys that no result depends on."""
    return {
        section: {name: value for name, value in values.items() if _counts(f"{section}.{name}")}
        for section, values in migrated(tree).items()
        if section not in ("report", "wandb")
    }


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys that differ in two configurations and that results depend on; `before` may be of an older version."""
    old, new = dict(_flat(settings_of(before))), dict(_flat(settings_of(now)))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _counts(key: str) -> bool:
    return key == "runtime.products" or not key.startswith(_WITHOUT_RESULT)


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key as `section.key`, or `section.block.key` where the schema has a block there."""
    known = families.complete_config([tree])
    for section, values in tree.items():
        for name, value in values.items():
            if is_dataclass(getattr(getattr(known, section, None), name, None)) and isinstance(value, Mapping):
                yield from ((f"{section}.{name}.{key}", v) for key, v in value.items())
            else:
                yield f"{section}.{name}", value
