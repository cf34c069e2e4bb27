"""May a run go on under another configuration than the one it was started with?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Keys that a run may change when it goes on: where things lie, what is shown, how long it goes on and which of its
# weights are best. They leave alone the model, the data, their order and everything else that a step takes from the
# configuration, except the learning rate of later steps: train.epochs and train.max_steps stretch the cosine, which is
# what somebody who asks for more epochs wants. evaluation.* can change which weights count as best, and with
# train.early_stopping_patience where the run ends; runtime.* can change how sums are rounded.
# data.path is among them because the content of the file is compared instead.
_HARMLESS = (
    "run.name", "run.dir", "run.resume", "run.force", "run.time_limit_minutes", "data.path", "train.epochs",
    "train.max_steps", "train.early_stopping_patience", "evaluation.", "checkpoint.", "runtime.", "log.", "wandb.",
)  # fmt: skip


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Differing keys of two resolved configurations as `key: was A, is B`: the harmful, then the harmless ones."""
    old, new = dict(_flat(before)), dict(_flat(now))
    incompatible: list[str] = []
    compatible: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            line = f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
            (compatible if key.startswith(_HARMLESS) else incompatible).append(line)
    return incompatible, compatible


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in tree.items():
        for name, value in values.items():
            yield f"{section}.{name}", value
