"""Values that follow from the table: keys that a configuration sets to `auto`, and the rule that gives them.

The rule is a pure function of the number of training rows, the columns and the classes. It knows nothing of ranks and
devices, so the same table has the same values everywhere. docs/any-table.md says how its numbers were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from dist_train.config.rules import problems_of
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError

AUTO = "auto"
KEYS_SET_TO_AUTO = "task.auto"


@dataclass(frozen=True, kw_only=True)
class TableSize:
    """What the rule knows of a table: training rows, numeric columns, codes of each categorical column, classes."""

    rows: int
    num_numeric: int
    category_sizes: tuple[int, ...]
    num_classes: int


def _batch_size(size: TableSize) -> int:
    """A power of two, a 64th of the rows, from 32 to 1024: small tables get enough steps, large ones fast products."""
    return min(1024, max(32, _power_of_two_below(size.rows // 64)))


def _epochs(size: TableSize) -> int:
    """Passes over the rows: 1,200 steps, and 320,000 rows with those that are seen again, but from 8 passes to 100."""
    return min(100, max(8, -(-1200 // _steps_per_epoch(size)), -(-320_000 // size.rows)))


def _patience(size: TableSize) -> int:
    """A third of the epochs, at least 4: the learning rate has fallen by then if it ever will."""
    return max(4, _epochs(size) // 3)


def _warmup_steps(size: TableSize) -> int:
    """A 20th of all steps, at most 100."""
    return min(100, _epochs(size) * _steps_per_epoch(size) // 20)


def _width(size: TableSize) -> int:
    """64 units; 128 from 50,000 rows on, which tell more functions apart."""
    return 64 if size.rows < 50_000 else 128


def _numeric_width(size: TableSize) -> int:
    """Values of each number: 8, and fewer where the columns together would have more than 256, at least 2."""
    return min(8, max(2, _power_of_two_below(256 // max(1, size.num_numeric))))


def _steps_per_epoch(size: TableSize) -> int:
    return max(1, size.rows // _batch_size(size))


def _power_of_two_below(number: int) -> int:
    """The largest power of two that is not above the number; 1 for 0."""
    return 1 << max(0, number.bit_length() - 1)


RULE: Mapping[str, Callable[[TableSize], Any]] = {
    "model.tabm.numeric_width": _numeric_width,
    "model.tabm.width": _width,
    "schedule.warmup_steps": _warmup_steps,
    "train.epochs": _epochs,
    "train.global_batch_size": _batch_size,
    "train.early_stopping_patience": _patience,
}
"""Key that may be `auto` -> its value for a table."""


def with_auto_values(config: JobConfig, size: TableSize) -> JobConfig:
    """The configuration with a value for every key that was set to `auto`; none is left.

    Raises:
        UserError: the values do not go with those of other keys.
    """
    if not config.task.auto:
        return config
    for key in config.task.auto:
        config = _with_value(config, key.split("."), RULE[key](size))
    problems = problems_of(config)
    if problems:
        raise UserError(f"with the values for {size.rows:,} training rows: {'; '.join(problems)}")
    return replace(config, task=replace(config.task, auto=[]))


def chosen_values(given: JobConfig, resolved: JobConfig) -> dict[str, Any]:
    """The values that keys set to `auto` in `given` have in `resolved`."""
    return {key: _value(resolved, key.split(".")) for key in given.task.auto}


def has_key(config: JobConfig, key: str) -> bool:
    """Whether a configuration has this key; it lacks those of model families that it does not choose."""
    node: Any = config
    for name in key.split("."):
        if not is_dataclass(node) or name not in {field.name for field in fields(node)}:
            return False
        node = getattr(node, name)
    return True


def with_auto_written_out(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested configuration in which keys listed in `task.auto` have the value `auto` instead."""
    copy = deepcopy(dict(content))
    task = copy.get("task")
    listed = task.get("auto") if isinstance(task, dict) else None
    if not isinstance(listed, list):
        return copy
    for key in [key for key in listed if key in RULE]:
        listed.remove(key)
        *path, last = str(key).split(".")
        node = copy
        for name in path:
            node = node.setdefault(name, {})
        node[last] = AUTO
    return copy


def _value(node: Any, path: list[str]) -> Any:
    for name in path:
        node = getattr(node, name)
    return node


def _with_value(node: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return replace(node, **{name: _with_value(getattr(node, name), rest, value) if rest else value})
