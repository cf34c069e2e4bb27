"""A trained classifier: its task and its weights, from a run folder or from a trained model alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from dist_train.accel.host_memory import use_host_memory
from dist_train.config.load import config_from_tree
from dist_train.config.members import is_ensemble, members_of
from dist_train.config.schema import JobConfig, RuntimeConfig
from dist_train.data.chunks import Chunk, ChunkedFile
from dist_train.data.frames import Table, frame_of
from dist_train.data.split import SPLITS
from dist_train.data.table import locate
from dist_train.data.unfamiliar import Unfamiliar
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.supervision import watched
from dist_train.distributed.world import World, device_here, process_group, world_from_environment
from dist_train.errors import UserError
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import CorruptCheckpoint
from dist_train.run.checkpoint.run_folder import RunFolder, opened_run
from dist_train.run.checkpoint.state import Parts, weights_sha256
from dist_train.run.checkpoint.trained_model import (
    CALIBRATION,
    DESCRIPTION,
    config_of_model,
    is_trained_model,
    read_trained_model,
)
from dist_train.run.labels import Labels, labels_of
from dist_train.run.members import Member, mean_probabilities, members_in, with_weights
from dist_train.run.rounds import Scored, scored_in_rounds
from dist_train.run.scoring import Calibrated, calibrated, calibrated_scores
from dist_train.run.session import scored_weights
from dist_train.system.console import log
from dist_train.tasks.base import Task
from dist_train.tasks.registry import description_in, restore_task
from dist_train.training.evaluation import scores
from dist_train.training.metrics import is_metric
from dist_train.training.protocols import Rows as EncodedRows
from dist_train.training.protocols import Source

Rows = Table | str | os.PathLike[str]
"""A table in memory, or the path of a CSV, JSON lines or Parquet file."""


class Predictor:
    """A trained classifier with its preprocessing and the configuration that it was trained with.

    `folder` is a run folder, or a trained model: `model/` of a run, or a copy of it. `checkpoint` is `best` (the
    trained model), `last`, or a step. Of an ensemble the probabilities are the mean over its members. They are
    calibrated where the trained model has a calibration and `calibrated` says so; None: where `calibration.apply` does.
    A checkpoint has none.

    Tables are DataFrames (polars, pandas), lists of records, dicts of columns, or paths of CSV, JSON lines and Parquet
    files. They need the feature columns, in any order; other columns are ignored.

    Raises:
        UserError: `folder` is neither of both, or what is asked for is not there, does not verify, or is of a format
            that this version does not read.
    """

    def __init__(
        self, folder: Path, collectives: Collectives, checkpoint: str = "best", *, calibrated: bool | None = None
    ) -> None:
        self._load(collectives.on_rank_zero(lambda: _read(folder, checkpoint)), collectives, calibrated)

    @classmethod
    def of_parts(cls, parts: Parts, collectives: Collectives, config: JobConfig | None = None) -> Predictor:
        """The classifier in the parts of a trained model; its configuration is read from them where it is not given."""
        config = config or config_of_model(parts, "the trained model")
        predictor = cls.__new__(cls)
        predictor._load(_of_parts(parts, config) | {"has_data": False}, collectives)
        return predictor

    def _load(self, found: Parts, collectives: Collectives, calibrated: bool | None = None) -> None:
        self.collectives = collectives
        self._told: set[str] = set()
        self.config = _with_known_metrics(found["config"])
        self._has_data: bool = found["has_data"]
        self.calibration: Calibrated | None = found["calibration"]
        """The calibration of the trained model, content of its calibration.json; None: it has none."""
        self.calibrated = self.calibration is not None and (
            self.config.calibration.apply if calibrated is None else calibrated
        )
        """Whether the probabilities of rows to score are calibrated."""
        self.members = [self._member(parts) for parts in found["members"]]
        self.fingerprint = _fingerprint(found, self.calibration if self.calibrated else None)
        """SHA-256 of what the probabilities of a row depend on."""
        steps = [parts["origin"]["step"] for parts in found["members"]]
        self.weights = f"weights of step {steps[0]}" if len(steps) == 1 else f"mean of {len(steps)} members"
        """Whose probabilities these are, in words."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.members[0].task.class_names

    @property
    def classes_(self) -> Labels:
        """Labels of the classes, in the order of the probabilities, (classes,): whole numbers, booleans, or text."""
        return labels_of(self.class_names)

    def predict_proba(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Probabilities, (rows, classes) float64: a row for each row of the table, in its order.

        Raises:
            UserError: a column is missing, or a cell cannot be read.
        """
        if isinstance(rows, (str, os.PathLike)):
            rounds = [part for part in self.scored(self.chunked(locate(os.fspath(rows)))) if part is not None]
            predicted: Tensor | None = torch.cat([part.probabilities for part in rounds])
            unfamiliar = sum((part.unfamiliar for part in rounds), Unfamiliar())
        else:
            frame = frame_of(rows, wanted=self.input_columns)
            predicted, unfamiliar = self._probabilities(frame, "the table", self.collectives)
        self.tell(unfamiliar)
        assert predicted is not None  # in a world of one
        return predicted.numpy()

    def predict(self, rows: Rows) -> Labels:
        """The label of the most probable class of each row, (rows,). Raises as `predict_proba`."""
        return np.asarray(self.classes_[self.predict_proba(rows).argmax(1)])

    def evaluate(self, split: str = "test", data: Rows | None = None) -> dict[str, Any]:
        """Metrics on a split of the run's own data, or on another table that has the target column.

        They are those of the model's own probabilities; `calibrated` holds those of the calibrated ones, if there is a
        calibration. All rows of another table count unless it has the split column.

        Raises:
            UserError: there is no such split, it has no rows, or a trained model without its run folder is given no
                table.
        """
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r} (--split {split}); there is {', '.join(SPLITS)}")
        if data is None and not self._has_data:
            raise UserError(
                "a trained model outside of its run folder has no data of its own: give a table (--data FILE)"
            )
        if data is None and split != "test" and len(self.members) > 1 and self.config.data.folds is not None:
            raise UserError(
                f"--split {split}: each fold of an ensemble has other {split} rows: summary.json and "
                "out_of_fold.parquet are of all folds; name a member for those of one"
            )
        with _file_of(data) as file:
            found = self.scored_split(split, file)
            if found is None:
                raise UserError(f"{file or self.config.data.path}: there are no {split} rows")
            predicted, labelled = found
            first = self.members[0].task
            with self.collectives.heartbeat.phase("evaluation"):
                metrics = scores(predicted, labelled, first, self.collectives)
                metrics |= calibrated_scores(self.calibration, predicted, labelled, first, self.collectives)
                unfamiliar = first.unfamiliar(labelled)
        self.tell(unfamiliar)
        return metrics | unfamiliar.as_json()

    def chunked(self, file: Path, keep: Sequence[str] = ()) -> ChunkedFile:
        """A CSV, JSON lines or Parquet file as the model reads it, with columns to carry over."""
        data, passes = self.config.data, self.config.evaluation.batch_size
        return ChunkedFile(file, self.input_columns, keep, data.missing_values, passes)

    def scored_split(self, split: str, file: Path | None = None) -> tuple[Tensor | None, Source] | None:
        """The model's own probabilities of the rows of a split, or of another file, and those rows.

        Called by all ranks. The probabilities, (rows, classes) float64, are on rank 0, None on the others. None where
        there are no rows, and for the validation rows of folds, of which each fold has others. Raises as `evaluate`.
        """
        first = self.members[0].task
        if file is None and split == "valid" and len(self.members) > 1 and self.config.data.folds is not None:
            return None
        labelled = first.labelled(split, file)
        if len(labelled) == 0:
            return None
        with self.collectives.heartbeat.phase("evaluation"):
            return self._mean(
                lambda task: labelled if task is first else task.labelled(split, file), self.collectives
            ), labelled

    def shipped(self, probabilities: Tensor) -> Tensor:
        """The model's own probabilities as it gives them out: calibrated, unless that is turned off."""
        if self.calibration is None or not self.calibrated:
            return probabilities
        return calibrated(self.calibration, probabilities)

    def scored(self, rows: ChunkedFile, first_row: int = 0) -> Iterator[Scored | None]:
        """Scores of a file from row `first_row` on, some rows at a time, in bounded memory; None on ranks other than 0.

        Called by all ranks. Probabilities do not depend on the number of ranks. Raises as `predict_proba`.
        """
        alone = Collectives(World(device=self.collectives.device))

        def score(chunk: Chunk) -> tuple[Tensor, Unfamiliar]:
            predicted, unfamiliar = self._probabilities(chunk.features, str(rows.file), alone, chunk.first_row)
            assert predicted is not None  # in a world of one
            return predicted, unfamiliar

        self.collectives.run_on_all(rows.check)
        with self.collectives.heartbeat.phase("evaluation"):
            yield from scored_in_rounds(rows.chunks(first_row), score, len(self.class_names), self.collectives)

    @property
    def input_columns(self) -> list[str]:
        """Columns of a table that a row is scored by."""
        return list(dict.fromkeys(name for member in self.members for name in member.task.input_columns))

    def _probabilities(
        self, frame: pl.DataFrame, source: str, collectives: Collectives, first_row: int = 0
    ) -> tuple[Tensor | None, Unfamiliar]:
        unfamiliar: list[Unfamiliar] = []

        def rows_of(task: Task) -> EncodedRows:
            rows = collectives.run_on_all(lambda: task.unlabelled(frame, source, first_row))
            if not unfamiliar:  # the members of an ensemble know nearly the same categories
                unfamiliar.append(task.unfamiliar(rows, frame))
            return rows

        predicted = self._mean(rows_of, collectives)
        return None if predicted is None else self.shipped(predicted), unfamiliar[0]

    def tell(self, unfamiliar: Unfamiliar) -> None:
        """Warn of each unfamiliar column once."""
        for line in unfamiliar.lines():
            name = line.partition(":")[0]
            if self.collectives.is_main and name not in self._told:
                log.warning("%s", line)
            self._told.add(name)

    def _mean(self, rows_of: Callable[[Task], EncodedRows], collectives: Collectives) -> Tensor | None:
        return mean_probabilities(self.members, rows_of, self.config.evaluation.batch_size, collectives)

    def _member(self, parts: Parts) -> Member:
        """A member reads its own data as it was trained, and scores as the whole does."""
        config = replace(parts["config"], evaluation=self.config.evaluation)
        task = restore_task(config, self.collectives, parts["task"], parts["origin"]["data_sha256"])
        return with_weights(task, parts["weights"])


@contextmanager
def _file_of(data: Rows | None) -> Iterator[Path | None]:
    """The file of a table, one that lives as long as the block for a table in memory; None where there is none."""
    if data is None or isinstance(data, (str, os.PathLike)):
        yield None if data is None else locate(os.fspath(data))
        return
    with TemporaryDirectory() as folder:
        file = Path(folder) / "table.parquet"
        frame_of(data).write_parquet(file)
        try:
            yield file
        except UserError as error:
            raise UserError(str(error).replace(str(file), "the table")) from None


def _fingerprint(found: Parts, calibration: Calibrated | None) -> str:
    digest = hashlib.sha256(json.dumps(calibration, sort_keys=True, default=str).encode())
    for parts in found["members"]:
        data, model = parts["config"].data, parts["config"].model
        read = {"missing_values": data.missing_values, "batch_size": found["config"].evaluation.batch_size}
        known = {**parts, "config": asdict(model), "weights": weights_sha256(parts["weights"]), **read}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _with_known_metrics(config: JobConfig) -> JobConfig:
    """A configuration without the metrics that a program registered which is another one than this."""
    known = [name for name in config.evaluation.metrics if is_metric(name)]
    left_out = [name for name in config.evaluation.metrics if name not in known]
    if left_out:
        log.warning("left out, because this program has not registered them: the metrics %s", ", ".join(left_out))
    return replace(config, evaluation=replace(config.evaluation, metrics=known))


@contextmanager
def open_predictor(
    folder: Path, checkpoint: str, environ: Mapping[str, str], *, calibrated: bool | None = None
) -> Iterator[Predictor]:
    """The classifier of a folder on all ranks that a launcher has started, inside the block. Raises as `Predictor`."""
    runtime = runtime_of(folder)
    world = world_from_environment(environ, device=device_here(runtime.device))
    timeout = runtime.timeout_seconds
    with process_group(world, timeout) as store:
        collectives = use_host_memory(Collectives(world))
        with watched(collectives, store, timeout_seconds=timeout, report_file=None):
            yield Predictor(folder, collectives, checkpoint, calibrated=calibrated)


def runtime_of(folder: Path) -> RuntimeConfig:
    """The section `runtime` of a run folder's configuration; of a trained model, the defaults. Raises UserError."""
    return RuntimeConfig() if _is_model_alone(folder) else opened_run(folder)[1].runtime


def _is_model_alone(folder: Path) -> bool:
    return is_trained_model(folder) and not RunFolder(folder).config.exists()


def _read(folder: Path, checkpoint: str) -> Parts:
    """`config`; `members`: of each `config`, `task`, `weights`, `origin` (step, data_sha256); `has_data`: of a run."""
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
        return _of_parts(parts, config_of_model(parts, str(folder)))
    except (CorruptCheckpoint, KeyError) as damage:
        raise UserError(f"the trained model is damaged: {damage}") from None


def _of_parts(parts: Parts, config: JobConfig) -> Parts:
    members = members_in(parts)
    configs = [config] if len(members) == 1 else [config_of_model(member, "a member") for member in members]
    return {
        "config": config,
        "calibration": parts.get(CALIBRATION),
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
    return {"config": config, "calibration": None, "members": [member]}


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
