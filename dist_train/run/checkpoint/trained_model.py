"""`model/`: the trained weights, and all that is needed to build the classifier again without its run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_train import __version__
from dist_train.config import families
from dist_train.config.compatibility import FORMATS
from dist_train.config.load import config_from_tree, read_config
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError
from dist_train.run.checkpoint.commit import MANIFEST
from dist_train.run.checkpoint.state import Parts, read_parts, weights_sha256

DESCRIPTION = "model.json"
ENSEMBLE = "ensemble.json"
"""The description of an ensemble, in the place of `model.json`."""
CALIBRATION = "calibration.json"
"""The calibration of the probabilities; a trained model without it is not calibrated."""
_OF_FORMAT_1 = "training.json"


def trained_model_parts(
    config: JobConfig,
    task: Mapping[str, Any],
    class_names: Sequence[str],
    weights: Mapping[str, Tensor],
    *,
    step: int,
    data_sha256: str,
    positive_class: str,
    witness: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
    unsaved: Mapping[str, Tensor] | None = None,
) -> Parts:
    """Parts of `model/`. `task` is the task's description; `weights` are those of `step`.

    `unsaved` are the classifier's weights that are not kept, since they are those of a pretrained model; they are part
    of `weights_sha256`. `positive_class` is the class that reasons and the report are about. `witness` has the `lines`
    and the `head` of witness.jsonl.
    """
    parts: Parts = {
        "model.pth": dict(weights),
        "task.json": dict(task),
        DESCRIPTION: {
            "format": FORMATS["trained model"],
            "dist_train": __version__,
            **describe_model(config, class_names),
            "step": step,
            "data_sha256": data_sha256,
            "positive_class": positive_class,
            "witness": dict(witness),
            "weights_sha256": weights_sha256({**weights, **(unsaved or {})}),
        },
    }
    return parts if calibration is None else parts | {CALIBRATION: dict(calibration)}


def describe_model(config: JobConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """What builds the model, reads a table for it and cuts the passes of an evaluation; not where the data were."""
    tree = asdict(config)
    del tree["data"]["path"]
    kept = {
        "run": {"seed": config.run.seed},
        "task": tree["task"],
        "data": tree["data"],
        **({"text": tree["text"]} if config.model.name in families.OF_TEXT else {}),
        "model": tree["model"],
        "train": {"precision": config.train.precision},
        "runtime": {"products": config.runtime.products},
        "evaluation": {"batch_size": config.evaluation.batch_size, "metrics": config.evaluation.metrics},
        "calibration": tree["calibration"],
    }
    return {"classes": list(class_names), "config": kept}


def config_of_model(parts: Parts, source: str) -> JobConfig:
    """The configuration in a trained model's description; keys that it does not hold have their defaults."""
    description = parts[ENSEMBLE] if ENSEMBLE in parts else parts[DESCRIPTION]
    return config_from_tree(description["config"], source)


def is_trained_model(folder: Path) -> bool:
    """Whether a folder looks like `model/` of a run, or a copy of it."""
    return (folder / MANIFEST).is_file() and any(
        (folder / name).is_file() for name in (DESCRIPTION, ENSEMBLE, _OF_FORMAT_1)
    )


def read_trained_model(folder: Path) -> Parts:
    """The parts of `model/`. One of format 1 gets its description from the `config.yaml` of its run folder.

    Raises:
        CorruptCheckpoint: the folder does not verify.
        UserError: this version does not read its format, or it is of format 1 and outside of its run folder.
    """
    parts = read_parts(folder)
    if _OF_FORMAT_1 in parts:
        config_file = folder.parent / "config.yaml"
        if not config_file.is_file():
            raise UserError(
                f"{folder}: a trained model of format 1 does not hold its architecture: that is in the config.yaml of "
                "its run folder; give the run folder"
            )
        description = describe_model(read_config(config_file), parts["encoder.json"]["class_names"])
        parts[DESCRIPTION] = {"format": 1, **description, **parts.pop(_OF_FORMAT_1)}
    return parts
