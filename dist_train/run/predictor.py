"""A run folder -> encoder + model -> probabilities. What evaluate and predict, and whatever scores later, stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from dist_train.data.dataset import encode, load_labelled, open_store, read_for_evaluation, remap_targets
from dist_train.data.encoder import Encoder
from dist_train.data.feed import ResidentRows, resident
from dist_train.data.mapped import MappedRows
from dist_train.data.split import SPLITS
from dist_train.data.store import is_store
from dist_train.data.table import locate, read_table
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.models.registry import build_model
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import CorruptCheckpoint
from dist_train.run.checkpoint.run_folder import RunFolder, opened_run
from dist_train.run.checkpoint.state import Parts, read_parts
from dist_train.run.session import scored_weights
from dist_train.system.console import log
from dist_train.training.evaluation import evaluate, probabilities


class Predictor:
    """A trained classifier with its encoder and the configuration that it was trained with.

    `checkpoint` is `best` (what the run ships), `last`, or a step. UserError when it is not there or does not verify.
    """

    def __init__(self, run_folder: Path, collectives: Collectives, checkpoint: str = "best") -> None:
        folder, self.config = opened_run(run_folder)
        self.collectives = collectives
        parts = collectives.on_rank_zero(lambda: _read(folder, checkpoint))
        state = parts["state.json"]
        self.step: int = state["step"]
        self.data_sha256: str = state["data_sha256"]
        self.encoder = Encoder.from_description(parts["encoder.json"], parts["encoder.pth"])
        self.model = self._model(parts["weights"])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.encoder.class_names

    def evaluate(self, split: str, file: Path | None = None) -> dict[str, Any]:
        """Metrics on a split of the run's own data, or on another file (all of it unless it has the split column)."""
        if split not in SPLITS:
            raise UserError(f"--split {split}: there is {', '.join(SPLITS)}")
        path = str(file or self.config.data.path)
        rows = self._stored(path, split) if is_store(path) else self._encoded(split, file)
        batch_size = self.config.evaluation.batch_size
        metrics = evaluate(self.model, rows, self.class_names, batch_size, self.collectives)
        if metrics is None:
            raise UserError(f"{path}: there are no {split} rows")
        return metrics

    def _encoded(self, split: str, file: Path | None) -> ResidentRows:
        frame, targets, chosen, source = self.collectives.run_on_all(lambda: self._rows(split, file))
        # The whole table is encoded, so that a bad cell is named by its row in the file.
        inputs = self.collectives.run_on_all(lambda: encode(frame, self.encoder, source))
        return resident(inputs, targets, chosen, self.collectives.device, self._dtype)

    def _stored(self, path: str, split: str) -> MappedRows:
        store = open_store(path, self.collectives, [split], encoder=self.encoder)
        if store.sha256 != self.data_sha256:
            log.warning("%s is not the store that the model was trained on", path)
        return MappedRows(store.tensors(split), self.collectives.device, self._dtype)

    def predict(self, file: Path) -> pl.DataFrame:
        """`probability_<class>` for each class and `predicted_class`: a row for each row of the file, in its order."""
        frame = read_table(file, self.config.data.missing_values)
        inputs = encode(frame, self.encoder, str(file))
        targets = torch.zeros(frame.height, dtype=torch.int64)
        rows = resident(inputs, targets, torch.arange(frame.height), self.collectives.device, self._dtype)
        batch_size = self.config.evaluation.batch_size
        predicted = probabilities(self.model, rows, batch_size, len(self.class_names), self.collectives)
        columns = {f"probability_{name}": predicted[:, i].numpy() for i, name in enumerate(self.class_names)}
        winners = [self.class_names[i] for i in predicted.argmax(1).tolist()]
        return pl.DataFrame(columns).with_columns(pl.Series("predicted_class", winners, dtype=pl.String))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _model(self, weights: dict[str, Tensor]) -> nn.Module:
        encoder = self.encoder
        model = build_model(
            self.config.model,
            input_dim=encoder.input_dim,
            embedded_sizes=encoder.embedded_sizes,
            num_classes=len(encoder.class_names),
            seed=self.config.run.seed,
        )
        dtype = next(t.dtype for t in weights.values() if t.is_floating_point())
        model.to(dtype)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"the weights do not fit the model of config.yaml: {str(error).splitlines()[0]}") from None
        return model.to(self.collectives.device).eval()

    def _rows(self, split: str, file: Path | None) -> tuple[pl.DataFrame, Tensor, Tensor, str]:
        """Table, class indices of its rows, the rows to evaluate on, and where they come from."""
        data = self.config.data
        if file is not None:
            return *read_for_evaluation(locate(str(file)), data, self.class_names, split), str(file)
        table = load_labelled(data, self.config.run.seed)
        if table.sha256 != self.data_sha256:
            log.warning("%s is not the file that the model was trained on", table.source)
        return table.frame, remap_targets(table, self.class_names), table.split[split], table.source


def _read(folder: RunFolder, checkpoint: str) -> Parts:
    """Encoder, weights and origin of the wanted checkpoint, under the same names wherever they come from."""
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    if checkpoint == "best" and folder.model.is_dir():
        try:
            parts = read_parts(folder.model)
            return parts | {"state.json": parts["training.json"], "weights": parts["model.pth"]}
        except (CorruptCheckpoint, KeyError) as damage:
            raise UserError(f"the trained model is damaged: {damage}") from None
    step = _step(checkpoints, checkpoint)
    parts = checkpoints.read(step)
    state = parts["state.json"]
    origin = {"step": step, "data_sha256": state["data_sha256"]}
    return parts | {"state.json": origin, "encoder.json": state["encoder"], "weights": scored_weights(parts)}


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
