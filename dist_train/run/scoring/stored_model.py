"""What a folder holds of a trained classifier: a run folder, or a trained model alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dist_train.config.load import config_from_tree
from dist_train.config.members import is_ensemble, members_of
from dist_train.config.schema import JobConfig, RuntimeConfig
from dist_train.errors import UserError
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import CorruptCheckpoint
from dist_train.run.checkpoint.run_folder import RunFolder, opened_run
from dist_train.run.checkpoint.state import Parts, weights_sha256
from dist_train.run.checkpoint.trained_model import (
    CALIBRATION,
    DESCRIPTION,
    ENSEMBLE,
    config_of_model,
    is_trained_model,
    read_trained_model,
)
from dist_train.run.scoring.members import members_in
from dist_train.run.session import scored_weights
from dist_train.tasks.registry import description_in


def runtime_of(folder: Path) -> RuntimeConfig:
    """The section `runtime` of a run folder's configuration; of a trained model, the defaults. Raises UserError."""
    return RuntimeConfig() if _is_model_alone(folder) else opened_run(folder)[1].runtime


def _is_model_alone(folder: Path) -> bool:
    return is_trained_model(folder) and not RunFolder(folder).config.exists()


def read_stored(folder: Path, checkpoint: str) -> Parts:
    """`config`; `calibration`; `positive_class`: None where it is not known; `has_data`: of a run; `members`.

    Of each of these `config`, `task`, `weights`, `origin` (step, data_sha256).
    """
    if _is_model_alone(folder):
        if checkpoint != "best":
            raise UserError(f"--checkpoint {checkpoint}: {folder} is a trained model, without checkpoints beside it")
        return _of_model(folder) | {"has_data": False}
    run, config = opened_run(folder)
    if is_ensemble(config):
        _refuse_unfinished(run, config, checkpoint)
    parts = _of_model(run.model) if checkpoint == "best" and run.model.is_dir() else _of_checkpoint(run, checkpoint)
    for content in (parts, *parts["members"]):
        data = replace(content["config"].data, path=config.data.path)  # it may lie elsewhere by now
        content["config"] = replace(content["config"], data=data)
    return parts | {"has_data": True}


def _refuse_unfinished(run: RunFolder, config: JobConfig, checkpoint: str) -> None:
    first = run.path / members_of(config)[0].name
    if checkpoint != "best":
        raise UserError(
            f"--checkpoint {checkpoint}: {run.path} is an ensemble, without checkpoints: name a member, as {first}"
        )
    if not run.model.is_dir():
        raise UserError(f"{run.path}: the ensemble is not finished: train it to its end, or name a member, as {first}")


def _of_model(folder: Path) -> Parts:
    try:
        parts = read_trained_model(folder)
        return parts_to_load(parts, config_of_model(parts, str(folder)))
    except (CorruptCheckpoint, KeyError) as damage:
        raise UserError(f"the trained model is damaged: {damage}") from None


def parts_to_load(parts: Parts, config: JobConfig) -> Parts:
    """The same of the parts of `model/`, without `has_data`."""
    members = members_in(parts)
    configs = [config] if len(members) == 1 else [config_of_model(member, "a member") for member in members]
    return {
        "config": config,
        "calibration": parts.get(CALIBRATION),
        "positive_class": parts[ENSEMBLE if ENSEMBLE in parts else DESCRIPTION].get("positive_class"),
        "members": [
            {
                "config": own,
                "task": description_in(member),
                "weights": member["model.pth"],
                "origin": {name: member[DESCRIPTION][name] for name in ("step", "data_sha256")},
            }
            for member, own in zip(members, configs, strict=True)
        ],
    }


def _of_checkpoint(run: RunFolder, checkpoint: str) -> Parts:
    checkpoints = Checkpoints(run.checkpoints, keep=1)
    step = _step(checkpoints, checkpoint)
    parts = checkpoints.read(step)
    state = parts["state.json"]
    config = config_from_tree(state["config"], str(checkpoints.path(step)))
    origin = {"step": step, "data_sha256": state["data_sha256"]}
    weights = scored_weights(parts)
    member = {"config": config, "task": description_in(parts), "weights": weights, "origin": origin}
    return {"config": config, "calibration": None, "positive_class": None, "members": [member]}


def _step(checkpoints: Checkpoints, wanted: str) -> int:
    if wanted.isdecimal():
        return int(wanted)
    if wanted not in ("best", "last"):
        raise UserError(f"--checkpoint {wanted}: must be best, last or a step")
    found, skipped = checkpoints.newest()
    if found is None:
        reason = skipped[0] if skipped else "none has been written"
        raise UserError(f"{checkpoints.folder}: there is no checkpoint to use: {reason}")
    best = found.parts["state.json"]["progress"]["best_step"]
    return best if wanted == "best" and best is not None else found.step


def fingerprint_of(found: Parts, calibration: Mapping[str, Any] | None) -> str:
    """SHA-256 of what the probabilities of a row depend on: what was read, and a calibration that is applied."""
    digest = hashlib.sha256(json.dumps(calibration, sort_keys=True, default=str).encode())
    for parts in found["members"]:
        data, model = parts["config"].data, parts["config"].model
        read = {"missing_values": data.missing_values, "batch_size": found["config"].evaluation.batch_size}
        known = {**parts, "config": asdict(model), "weights": weights_sha256(parts["weights"]), **read}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()
