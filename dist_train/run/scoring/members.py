"""Trained models whose probabilities are averaged, and the parts of `model/` that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from dist_train import __version__
from dist_train.config.compatibility import FORMATS
from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.run.checkpoint.state import Parts, weights_sha256
from dist_train.run.checkpoint.trained_model import CALIBRATION, DESCRIPTION, ENSEMBLE, describe_model
from dist_train.tasks.base import Task
from dist_train.training.evaluation import probabilities
from dist_train.training.protocols import Rows

R = TypeVar("R")


@dataclass(frozen=True)
class Member:
    """A trained model and the task that reads its inputs."""

    task: Task
    model: nn.Module


def with_weights(task: Task, weights: Mapping[str, Tensor]) -> Member:
    """The model of a task with trained weights; UserError where they do not fit it."""
    model = task.model()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights do not fit the architecture that was saved with them: {str(error).splitlines()[0]}"
        ) from None
    return Member(task, model.eval())


def shared(rows_of: Callable[[Task], R]) -> Callable[[Task], R]:
    """`rows_of`, called once for tasks that follow each other and encode alike."""
    former: tuple[Task, R] | None = None

    def of(task: Task) -> R:
        nonlocal former
        if former is None or not task.matches(former[0].description()):
            former = task, rows_of(task)
        return former[1]

    return of


def mean_probabilities(
    members: Iterable[Member], rows_of: Callable[[Task], Rows], batch_size: int, collectives: Collectives
) -> Tensor | None:
    """Mean over the members of their class probabilities on rank 0, (rows, classes) float64; None on other ranks.

    `rows_of` gives the rows as a member's task encodes them. Members that follow each other and encode alike share
    them.
    """
    total, count = None, 0
    encoded = shared(rows_of)
    for member in members:
        predicted = probabilities(member.model, encoded(member.task), batch_size, member.task, collectives)
        if predicted is not None:
            total = predicted if total is None else total.add_(predicted)
        count += 1
    return total if total is None or count == 1 else total.div_(count)


def ensemble_parts(
    config: JobConfig, names: Sequence[str], members: Sequence[Parts], calibration: Mapping[str, Any] | None = None
) -> Parts:
    """Parts of the `model/` of an ensemble, of those of its members.

    `model.pth` holds the weights of all members; a name begins with the member's number and a dot. `calibration` is
    that of the mean; a member's own is not kept.
    """
    weights = {f"{i}.{name}": tensor for i, parts in enumerate(members) for name, tensor in parts["model.pth"].items()}
    class_names = members[0][DESCRIPTION]["classes"]
    parts: Parts = {
        "model.pth": weights,
        ENSEMBLE: {
            "format": FORMATS["ensemble"],
            "dist_train": __version__,
            **describe_model(config, class_names),
            "data_sha256": members[0][DESCRIPTION]["data_sha256"],
            "positive_class": members[0][DESCRIPTION].get("positive_class"),
            "weights_sha256": weights_sha256(weights),
            "members": [
                {"name": name, DESCRIPTION: parts[DESCRIPTION], "task.json": parts["task.json"]}
                for name, parts in zip(names, members, strict=True)
            ],
        },
    }
    return parts if calibration is None else parts | {CALIBRATION: dict(calibration)}


def members_in(parts: Parts) -> list[Parts]:
    """The parts of each member of an ensemble; of a trained model, its own."""
    if ENSEMBLE not in parts:
        return [parts]
    described: list[dict[str, Any]] = parts[ENSEMBLE]["members"]
    return [
        {
            "model.pth": {
                name.removeprefix(f"{index}."): tensor
                for name, tensor in parts["model.pth"].items()
                if name.startswith(f"{index}.")
            },
            **{name: part for name, part in member.items() if name.endswith(".json")},
        }
        for index, member in enumerate(described)
    ]
