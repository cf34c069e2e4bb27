"""A trained classifier: its task and its weights, from a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor, nn

from dist_train.data.split import SPLITS
from dist_train.data.table import read_table
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import CorruptCheckpoint
from dist_train.run.checkpoint.run_folder import RunFolder, opened_run
from dist_train.run.checkpoint.state import Parts, read_parts
from dist_train.run.session import scored_weights
from dist_train.tasks.registry import description_in, restore_task
from dist_train.training.evaluation import evaluate, probabilities


class Predictor:
    """A trained classifier with its preprocessing and the configuration that it was trained with.

    `checkpoint` is `best` (the exported model), `last`, or a step.

    Raises:
        UserError: the checkpoint is not there or does not verify.
    """

    def __init__(self, run_folder: Path, collectives: Collectives, checkpoint: str = "best") -> None:
        folder, self.config = opened_run(run_folder)
        self.collectives = collectives
        parts = collectives.on_rank_zero(lambda: _read(folder, checkpoint))
        self.step: int = parts["origin"]["step"]
        self.task = restore_task(self.config, collectives, parts["task"], parts["origin"]["data_sha256"])
        self.model = self._model(parts["weights"])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.task.class_names

    def evaluate(self, split: str, file: Path | None = None) -> dict[str, Any]:
        """Metrics on a split of the run's own data, or on another file (all of it unless it has the split column).

        Raises:
            UserError: there is no such split, or it has no rows.
        """
        if split not in SPLITS:
            raise UserError(f"--split {split}: there is {', '.join(SPLITS)}")
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
            raise UserError(f"the weights do not fit the model of config.yaml: {str(error).splitlines()[0]}") from None
        return model.eval()


def _read(folder: RunFolder, checkpoint: str) -> Parts:
    """`task`, `weights` and `origin` (step, data_sha256) of the wanted checkpoint."""
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    if checkpoint == "best" and folder.model.is_dir():
        try:
            parts = read_parts(folder.model)
            return {"task": description_in(parts), "weights": parts["model.pth"], "origin": parts["training.json"]}
        except (CorruptCheckpoint, KeyError) as damage:
            raise UserError(f"the trained model is damaged: {damage}") from None
    step = _step(checkpoints, checkpoint)
    parts = checkpoints.read(step)
    origin = {"step": step, "data_sha256": parts["state.json"]["data_sha256"]}
    return {"task": description_in(parts), "weights": scored_weights(parts), "origin": origin}


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
