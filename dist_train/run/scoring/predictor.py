"""A trained classifier: its task and its weights, from a run folder or from a trained model alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor, nn

from dist_train.accel.host_memory import use_host_memory
from dist_train.config.rules import named_positive_class
from dist_train.config.schema import JobConfig
from dist_train.data.encoding.unfamiliar import Unfamiliar
from dist_train.data.splits.split import SPLITS
from dist_train.data.tables.chunks import Chunk, ChunkedFile
from dist_train.data.tables.frames import Table, frame_of
from dist_train.data.tables.table import locate
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.supervision import watched
from dist_train.distributed.world import World, device_here, process_group, world_from_environment
from dist_train.errors import UserError
from dist_train.risk.calibration import calibration_from_json
from dist_train.run.checkpoint.state import Parts, weights_sha256
from dist_train.run.checkpoint.trained_model import (
    CALIBRATION,
    config_of_model,
)
from dist_train.run.scoring.explanation import Explainer, Explanation, width_of_reasons
from dist_train.run.scoring.labels import Labels, labels_of
from dist_train.run.scoring.members import Member, mean_probabilities, with_weights
from dist_train.run.scoring.rounds import Scored, scored_in_rounds
from dist_train.run.scoring.scores import Calibrated, calibrated, calibrated_scores
from dist_train.run.scoring.stored_model import fingerprint_of, parts_to_load, read_stored, runtime_of
from dist_train.system.console import log
from dist_train.tasks.base import ScoresFewRows, Task
from dist_train.tasks.registry import restore_task
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
        self._load(collectives.on_rank_zero(lambda: read_stored(folder, checkpoint)), collectives, calibrated)

    @classmethod
    def of_parts(cls, parts: Parts, collectives: Collectives, config: JobConfig | None = None) -> Predictor:
        """The classifier in the parts of a trained model; its configuration is read from them where it is not given."""
        config = config or config_of_model(parts, "the trained model")
        predictor = cls.__new__(cls)
        predictor._load(parts_to_load(parts, config) | {"has_data": False}, collectives)
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
        self.fingerprint = fingerprint_of(found, self.calibration if self.calibrated else None)
        """SHA-256 of what the probabilities of a row depend on."""
        self._positive_class: str | None = found["positive_class"]
        self._explainers: dict[str, Explainer] = {}
        self.hashes = [
            {"weights_sha256": weights_sha256(parts["weights"]), "data_sha256": parts["origin"]["data_sha256"]}
            for parts in found["members"]
        ]
        """Of each member: SHA-256 of its weights, and of the data that it was trained on."""
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
            predicted, unfamiliar, _ = self._explained(frame, "the table", self.collectives)
        self.tell(unfamiliar)
        assert predicted is not None  # in a world of one
        return predicted.numpy()

    def predict(self, rows: Rows) -> Labels:
        """The label of the most probable class of each row, (rows,). Raises as `predict_proba`."""
        return np.asarray(self.classes_[self.predict_proba(rows).argmax(1)])

    def explain(self, rows: Table, positive_class: str | None = None) -> Explanation:
        """The effects of the columns on the log-odds of a class, of each row of a table in memory.

        `positive_class` is the class; None: that of `report.positive_class`, or else the class with the fewest
        training rows.

            predictor.explain(frame).reasons(4)     # a DataFrame: the columns that raise the log-odds of each row most

        Raises:
            UserError: as `predict_proba`; or there is no such class, or the model's columns have no known effects.
        """
        explanation, unfamiliar = self.explained(frame_of(rows, wanted=self.input_columns), positive_class)
        self.tell(unfamiliar)
        return explanation

    def explained(self, frame: pl.DataFrame, positive_class: str | None = None) -> tuple[Explanation, Unfamiliar]:
        """As `explain`, and what is unfamiliar, of which nothing is told: a warning names values."""
        explainer = self.explainer(positive_class)
        _, unfamiliar, explanation = self._explained(frame, "the table", self.collectives, explainer)
        assert explanation is not None  # in a world of one
        return explanation, unfamiliar

    def explainer(self, positive_class: str | None = None) -> Explainer:
        """What explains the log-odds of a class. Raises as `explain`."""
        named = named_positive_class(self.config.report, self.class_names)
        name = positive_class or named or self._positive_class
        if name is None:
            raise UserError(
                "reasons: a checkpoint, and a trained model of an earlier release, does not say which class they are "
                "for: name it (--reasons-for CLASS)"
            )
        if name not in self.class_names:
            raise UserError(f"reasons: there is no class {name!r}; there is {', '.join(self.class_names)}")
        if name not in self._explainers:
            calibration = self.calibration if self.calibrated else None
            applied = None if calibration is None else calibration_from_json(calibration, CALIBRATION)
            place = self.class_names.index(name)
            self._explainers[name] = Explainer(self.members, self.input_columns, self.class_names, place, applied)
        return self._explainers[name]

    def evaluate(self, split: str = "test", data: Rows | None = None, *, all_drift: bool = False) -> dict[str, Any]:
        """Metrics on a split of the run's own data, or on another table that has the target column.

        They are those of the model's own probabilities; `calibrated` holds those of the calibrated ones, if there is a
        calibration. All rows of another table count unless it has the split column. `drift` holds the population
        stability index of the columns that have moved from the training rows; with `all_drift` of every column.

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
        self.tell(unfamiliar, drift=True)
        return metrics | unfamiliar.as_json(all_drift=all_drift)

    def chunked(self, file: Path, keep: Sequence[str] = ()) -> ChunkedFile:
        """A CSV, JSON lines or Parquet file as the model reads it, with columns to carry over."""
        data, passes = self.config.data, self.config.evaluation.batch_size
        first = self.members[0].task
        most = first.rows_of_chunk if isinstance(first, ScoresFewRows) else None
        return ChunkedFile(file, self.input_columns, keep, data.missing_values, passes, most)

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

    def compute_with(self, model: nn.Module, name: str) -> None:
        """Have another model, which takes and gives what the only member's does, compute; `name` identifies it."""
        self.members = [Member(self.members[0].task, model)]
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {name}".encode()).hexdigest()

    def shipped(self, probabilities: Tensor) -> Tensor:
        """The model's own probabilities as it gives them out: calibrated, unless that is turned off."""
        if self.calibration is None or not self.calibrated:
            return probabilities
        return calibrated(self.calibration, probabilities)

    def scored(
        self, rows: ChunkedFile, first_row: int = 0, explainer: Explainer | None = None, reasons: int = 0
    ) -> Iterator[Scored | None]:
        """Scores of a file from row `first_row` on, some rows at a time, in bounded memory; None on ranks other than 0.

        With an `explainer`, so many `reasons` for each row as well. Called by all ranks. Scores do not depend on the
        number of ranks. Raises as `predict_proba`.
        """
        alone = Collectives(World(device=self.collectives.device))

        def score(chunk: Chunk) -> tuple[Tensor, Unfamiliar]:
            predicted, unfamiliar, explanation = self._explained(
                chunk.features, str(rows.file), alone, explainer, chunk.first_row
            )
            assert predicted is not None  # in a world of one
            if explanation is not None:
                predicted = torch.cat([predicted, explanation.numbers(reasons)], 1)
            return predicted, unfamiliar

        self.collectives.run_on_all(rows.check)
        with self.collectives.heartbeat.phase("evaluation"):
            width = width_of_reasons(reasons) if explainer else 0
            chunks = rows.chunks(first_row)
            yield from scored_in_rounds(chunks, score, len(self.class_names), self.collectives, width)

    @property
    def input_columns(self) -> list[str]:
        """Columns of a table that a row is scored by."""
        return list(dict.fromkeys(name for member in self.members for name in member.task.input_columns))

    def _explained(
        self,
        frame: pl.DataFrame,
        source: str,
        collectives: Collectives,
        explainer: Explainer | None = None,
        first_row: int = 0,
    ) -> tuple[Tensor | None, Unfamiliar, Explanation | None]:
        """Shipped probabilities, what is unfamiliar, and what an explainer says of the rows."""
        unfamiliar: list[Unfamiliar] = []
        encoded: dict[Task, EncodedRows] = {}

        def rows_of(task: Task) -> EncodedRows:
            if task in encoded:
                return encoded[task]
            rows = collectives.run_on_all(lambda: task.unlabelled(frame, source, first_row))
            if explainer is not None:
                encoded[task] = rows
            if not unfamiliar:  # the members of an ensemble know nearly the same categories
                unfamiliar.append(task.unfamiliar(rows, frame))
            return rows

        own = self._mean(rows_of, collectives)
        if own is None:
            return None, unfamiliar[0], None
        shipped = self.shipped(own)
        if explainer is None:
            return shipped, unfamiliar[0], None
        explanation = explainer.explain(rows_of, shipped if explainer.explains_calibrated else own)
        return shipped, unfamiliar[0], explanation

    def tell(self, unfamiliar: Unfamiliar, *, drift: bool = False) -> None:
        """Warn of each unfamiliar column once, and of drift, which is that of a whole file."""
        for line in [*unfamiliar.lines(), *(unfamiliar.drift_lines() if drift else ())]:
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
