"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeVar

from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.plugins import Registry
from dist_train.tasks.base import Description, Task
from dist_train.tasks.tabular import TabularTask, tabular_description_of_format_1


class TaskType(Protocol):
    """How a task comes to be, for training or for scoring."""

    def load(self, config: JobConfig, collectives: Collectives, fitted: Description | None = None) -> Task:
        """The task with its data; preprocessing is fitted to the training rows unless `fitted` says what it was."""

    def restore(self, config: JobConfig, collectives: Collectives, fitted: Description, fingerprint: str) -> Task:
        """The task of a trained model, without data; `fingerprint` is that of the data that it was trained on."""


_TypeOfTask = TypeVar("_TypeOfTask", bound=TaskType)


@dataclass(frozen=True)
class _Imported:
    """A task of a module that is imported when the task is asked for: those of texts import transformers."""

    module: str
    name: str

    def load(self, config: JobConfig, collectives: Collectives, fitted: Description | None = None) -> Task:
        """As TaskType."""
        return self._type().load(config, collectives, fitted)

    def restore(self, config: JobConfig, collectives: Collectives, fitted: Description, fingerprint: str) -> Task:
        """As TaskType."""
        return self._type().restore(config, collectives, fitted, fingerprint)

    def _type(self) -> TaskType:
        found: TaskType = getattr(import_module(self.module), self.name)
        return found


_TASKS: Registry[TaskType] = Registry(
    "task",
    "task.name",
    "dist_train.tasks",
    {
        "tabular": TabularTask,
        "text": _Imported("dist_train.tasks.text", "TextTask"),
        "instruction": _Imported("dist_train.tasks.instruction", "InstructionTask"),
    },
)


def register_task(name: str) -> Callable[[_TypeOfTask], _TypeOfTask]:
    """Decorator that makes a class the task `name`, for `task.name=<name>`.

    The class has the two functions of `TaskType`, and its objects are a `Task`. Its description holds its name under
    `task`.

    Raises:
        ValueError: the name is empty, or a task of this package has it.
    """

    def register(task_type: _TypeOfTask) -> _TypeOfTask:
        _TASKS.register(name, task_type)
        return task_type

    return register


def task_type(name: str) -> TaskType:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    return _TASKS.find(name)


def load_task(config: JobConfig, collectives: Collectives, fitted: Description | None = None) -> Task:
    """The task of a configuration, with its data. Raises Stopped when the ranks have agreed to stop."""
    return task_type(config.task.name).load(config, collectives, fitted)


def description_in(parts: Mapping[str, Any]) -> Description:
    """The task in the parts of a checkpoint or of `model/`, of this format or of format 1."""
    if "task.json" in parts:
        return dict(parts["task.json"])
    encoder = parts["encoder.json"] if "encoder.json" in parts else parts["state.json"]["encoder"]
    return tabular_description_of_format_1(encoder, parts["encoder.pth"])


def restore_task(config: JobConfig, collectives: Collectives, fitted: Description, fingerprint: str) -> Task:
    """The task that a model was trained for, without data."""
    return task_type(fitted["task"]).restore(config, collectives, fitted, fingerprint)
