"""A fitted classifier in a folder: a trained model, and beside it `classifier.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config.compatibility import FORMATS
from dist_train.config.load import config_from_tree
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError
from dist_train.run.checkpoint.commit import CorruptCheckpoint, commit
from dist_train.run.checkpoint.state import Parts, encode_parts
from dist_train.run.checkpoint.trained_model import is_trained_model, read_trained_model

CLASSIFIER = "classifier.json"


def write_classifier(folder: Path, parts: Parts, params: Mapping[str, Any], fitted: Mapping[str, Any]) -> None:
    """Commit the parts of a trained model with the estimator's parameters and what `fit` has left.

    Raises:
        UserError: the folder holds something else than a trained model, or cannot be written.
    """
    if folder.exists() and not is_trained_model(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something else than a trained model: name another folder")
    names = fitted.get("feature_names_in_")
    content = {
        "format": FORMATS["classifier"],
        "params": {name: _packed(value) for name, value in params.items()},
        "labels": {"dtype": fitted["classes_"].dtype.str, "values": fitted["classes_"].tolist()},
        "order": fitted["_order"],
        "columns": fitted["n_features_in_"],
        "names": None if names is None else list(names),
        "summary": fitted["summary_"],
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        commit(folder, encode_parts(parts | {CLASSIFIER: content}))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


def read_classifier(folder: Path) -> tuple[Parts, dict[str, Any], dict[str, Any]]:
    """The parts of the trained model, the estimator's parameters, and its fitted attributes.

    Raises:
        UserError: there is no classifier in the folder, it does not verify, or is of a format of another version.
    """
    if not is_trained_model(folder):
        raise UserError(f"{folder}: there is no saved classifier")
    try:
        parts = read_trained_model(folder)
    except CorruptCheckpoint as damage:
        raise UserError(f"the saved classifier is damaged: {damage}") from None
    if CLASSIFIER not in parts:
        raise UserError(f"{folder}: is a trained model that no Classifier has saved: read it with dist_train.load")
    content = parts.pop(CLASSIFIER)
    fitted = {
        "classes_": np.array(content["labels"]["values"], dtype=content["labels"]["dtype"]),
        "n_features_in_": content["columns"],
        "summary_": content["summary"],
        "_order": content["order"],
    }
    if content["names"] is not None:
        fitted["feature_names_in_"] = np.array(content["names"], dtype=object)
    return parts, {name: _unpacked(value, folder) for name, value in content["params"].items()}, fitted


def _packed(value: Any) -> Any:
    """A parameter as JSON."""
    if isinstance(value, JobConfig):
        return {"config": asdict(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_packed(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _unpacked(value: Any, folder: Path) -> Any:
    return config_from_tree(value["config"], str(folder)) if isinstance(value, dict) else value
