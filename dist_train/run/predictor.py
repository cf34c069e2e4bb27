"""A trained classifier: its task and its weights, from a run folder or from a trained model alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor, nn

from dist_train.config.load import config_from_tree
from dist_train.config.schema import JobConfig, RuntimeConfig
from dist_train.data.split import SPLITS
from dist_train.data.table import read_table
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import CorruptCheckpoint
from dist_train.run.checkpoint.run_folder import RunFolder, opened_run
from dist_train.run.checkpoint.state import Parts
from dist_train.run.checkpoint.trained_model import (
    DESCRIPTION,
    config_of_model,
    is_trained_model,
    read_trained_model,
)
from dist_train.run.session import scored_weights
from dist_train.tasks.registry import description_in, restore_task
from dist_train.training.evaluation import evaluate, probabilities


class Predictor:
    """A trained classifier with its preprocessing and the configuration that it was trained with.

    `folder` is a run folder, or a trained model: `model/` of a run, or a copy of it. `checkpoint` is `best` (the
    trained model), `last`, or a step.

    Raises:
        UserError: `folder` is neither of both, or what is asked for is not there, does not verify, or is of a format
            that this version does not read.
    """

    def __init__(self, folder: Path, collectives: Collectives, checkpoint: str = "best") -> None:
        self.collectives = collectives
        parts = collectives.on_rank_zero(lambda: _read(folder, checkpoint))
        self.config: JobConfig = parts["config"]
        self.step: int = parts["origin"]["step"]
        self._has_data: bool = parts["has_data"]
        self.task = restore_task(self.config, collectives, parts["task"], parts["origin"]["data_sha256"])
        self.model = self._model(parts["weights"])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.task.class_names

    def evaluate(self, split: str, file: Path | None = None) -> dict[str, Any]:
        """Metrics on a split of the run's own data, or on another file (all of it unless it has the split column).

        Raises:
            UserError: there is no such split, it has no rows, or a trained model without its run folder is given no
                file.
        """
        if split not in SPLITS:
            raise UserError(f"--split {split}: there is {', '.join(SPLITS)}")
        if file is None and not self._has_data:
            raise UserError("a trained model outside of its run folder has no data of its own: give --data FILE")
        rows = self.task.labelled(split, file)
        metrics = evaluate(self.model, rows, self.task, self.config.evaluation.batch_size, self.collectives)
        if metrics is None:
            raise UserError(f"{file or self.config.data.path}: there are no {split} rows")
        return metrics

    def predict(self, file: Path) -> pl.DataFrame | None:
        """`probability_<class>` for each class and `predicted_class`: a row for each row of the file, in its order.

        None on ranks other than 0.
        """
        rows = self.task.unlabelled(read_table(file, self.config.data.missing_values), str(file))
        predicted = probabilities(self.model, rows, self.config.evaluation.batch_size, self.task, self.collectives)
        if predicted is None:
            return None
        columns = {f"probability_{name}": predicted[:, i].numpy() for i, name in enumerate(self.class_names)}
        winners = [self.class_names[i] for i in predicted.argmax(1).tolist()]
        return pl.DataFrame(columns).with_columns(pl.Series("predicted_class", winners, dtype=pl.String))

    def _model(self, weights: dict[str, Tensor]) -> nn.Module:
        model = self.task.model()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"the weights do not fit the architecture that was saved with them: {str(error).splitlines()[0]}"
            ) from None
        return model.eval()


def runtime_of(folder: Path) -> RuntimeConfig:
    """The section `runtime` of a run folder's configuration; of a trained model, the defaults. Raises UserError."""
    return RuntimeConfig() if _is_model_alone(folder) else opened_run(folder)[1].runtime


def _is_model_alone(folder: Path) -> bool:
    return is_trained_model(folder) and not RunFolder(folder).config.exists()


def _read(folder: Path, checkpoint: str) -> Parts:
    """`config`, `task`, `weights` and `origin` (step, data_sha256) of the wanted checkpoint; `has_data`: of a run."""
    if _is_model_alone(folder):
        if checkpoint != "best":
            raise UserError(f"--checkpoint {checkpoint}: {folder} is a trained model, without checkpoints beside it")
        return _of_model(folder) | {"has_data": False}
    run, config = opened_run(folder)
    parts = _of_model(run.model) if checkpoint == "best" and run.model.is_dir() else _of_checkpoint(run, checkpoint)
    data = replace(parts["config"].data, path=config.data.path)  # it may lie elsewhere by now
    return parts | {"config": replace(parts["config"], data=data), "has_data": True}


def _of_model(folder: Path) -> Parts:
    try:
        parts = read_trained_model(folder)
        return {
            "config": config_of_model(parts, str(folder)),
            "task": description_in(parts),
            "weights": parts["model.pth"],
            "origin": {name: parts[DESCRIPTION][name] for name in ("step", "data_sha256")},
        }
    except (CorruptCheckpoint, KeyError) as damage:
        raise UserError(f"the trained model is damaged: {damage}") from None


def _of_checkpoint(run: RunFolder, checkpoint: str) -> Parts:
    checkpoints = Checkpoints(run.checkpoints, keep=1)
    step = _step(checkpoints, checkpoint)
    parts = checkpoints.read(step)
    state = parts["state.json"]
    return {
        "config": config_from_tree(state["config"], str(checkpoints.path(step))),
        "task": description_in(parts),
        "weights": scored_weights(parts),
        "origin": {"step": step, "data_sha256": state["data_sha256"]},
    }


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
