"""The contract of a task. A run, its checkpoints and everything above them know a task and nothing below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import polars as pl
import torch
from torch import Tensor, nn

from dist_train.config.schema import JobConfig, ReportConfig
from dist_train.data.encoding.unfamiliar import Unfamiliar
from dist_train.determinism.arithmetic import Arithmetic
from dist_train.training.loss import Objective
from dist_train.training.protocols import Source

Description = dict[str, Any]
"""JSON: everything that is needed, beside the weights, to build a task's model and to read its inputs again."""


class Task(Protocol):
    """What is trained.

    A model's `forward(*inputs)` gives logits, (rows, classes), or (rows, members, classes) for an ensemble whose
    members are trained together. `splits` is empty in a task that was restored to score new data.
    """

    @property
    def config(self) -> JobConfig:
        """What the task was loaded with, with a value for every key that was `auto`."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""

    @property
    def splits(self) -> Mapping[str, Source]:
        """Rows of `train`, `valid` and `test`, in the order of the data."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data; empty in a task that was restored."""

    @property
    def num_inputs(self) -> int:
        """Width of what the model sees of a row, for the plan."""

    @property
    def arithmetic(self) -> Arithmetic:
        """That of the exact mode, and of whatever scores."""

    def model(self, device: torch.device | None = None) -> nn.Module:
        """A new model with initial weights that are a function of the seed, on the device, in the run's precision."""

    def objective(self) -> Objective:
        """The training loss, as sums per slice."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits -> (rows, classes) float64."""

    def metrics(self, probabilities: Tensor, targets: Tensor, weights: Tensor | None = None) -> dict[str, Any]:
        """Metrics of (rows, classes) float64 probabilities against (rows,) class indices, both on the CPU; JSON types.

        `weights`, (rows,) float64: how much each row counts; None: all count 1.
        `loss` is among them: the best checkpoint is that of the lowest.
        """

    def description(self) -> Description:
        """What a checkpoint and `model/` keep of the task; its `format` is a number."""

    def matches(self, description: Description) -> bool:
        """Whether a task that is described so, perhaps by an earlier release, reads every input as this one does."""

    def labelled(self, split: str, file: Path | None = None) -> Source:
        """Rows to evaluate on: a split of the run's own data, or of another file.

        Raises:
            UserError: there are no such rows, or the file does not fit the model.
        """

    @property
    def input_columns(self) -> Sequence[str]:
        """Columns of a table that a row is scored by; no other column is read."""

    def unfamiliar(self, rows: Source, table: pl.DataFrame | None = None) -> Unfamiliar:
        """What the model has not seen the like of among some rows; of `table`, if they were made of one."""

    def inputs(self) -> list[str]:
        """What the columns of the data became, in lines for the plan."""

    def unlabelled(self, table: pl.DataFrame, source: str, first_row: int = 0) -> Source:
        """Rows of a table to score, in its order; the targets are zeros. It begins with row `first_row` of the source.

        Raises:
            UserError: a column is missing, or a cell cannot be read.
        """


@runtime_checkable
class KeepsFiles(Protocol):
    """A task that has the run folder keep what it made of the data, so that it is made once."""

    def kept_files(self) -> Mapping[str, bytes]:
        """Content by name of the file in the run folder."""


@runtime_checkable
class NamesPretrained(Protocol):
    """A task whose checkpoints name the model that was trained on, and do not hold it."""

    def as_trained(self, description: Description) -> Task:
        """This task, or one that makes of the same data what the one that is described so has made of them.

        Raises:
            UserError: that one had another pretrained model or tokenizer.
        """


@runtime_checkable
class ShipsFiles(Protocol):
    """A task whose trained model is also shipped in the formats of other libraries."""

    def shipped_files(self, weights: Mapping[str, Tensor]) -> Mapping[str, bytes]:
        """Content by name of the file below `model/`, of trained weights."""


@runtime_checkable
class HasTable(Protocol):
    """A task whose rows are those of a table, of which a report shows columns."""

    def table(self, columns: Sequence[str], report: ReportConfig) -> pl.DataFrame | None:
        """The `columns`, and those of `report.segments`, of all rows; None where the data keep none.

        Raises:
            UserError: a column of `report.segments` is not there.
        """


@runtime_checkable
class ScoresFewRows(Protocol):
    """A task whose rows take long to score: a file is cut in small chunks, so that all threads have some."""

    @property
    def rows_of_chunk(self) -> int:
        """Rows of a chunk at most."""


@runtime_checkable
class HasAnswers(Protocol):
    """A task whose model scores an answer for each class behind a prompt."""

    @property
    def answers(self) -> Sequence[Sequence[int]]:
        """Token ids of the answer for each class, the one that ends it among them."""


@runtime_checkable
class HasBaselines(Protocol):
    """A task that scores other models on the same rows."""

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Metrics of the test rows by name of the other model, the same on every rank; called by all of them."""


@runtime_checkable
class Explainable(Protocol):
    """What a task has beside the contract where the scores of its rows can be explained by their columns."""

    @property
    def columns_of_inputs(self) -> Sequence[Sequence[str]]:
        """The columns of `input_columns` that the values of each of a model's inputs are of."""

    @property
    def continuous_inputs(self) -> Sequence[bool]:
        """Whether an input can have every value between two others, unlike one of codes."""

    def typical_inputs(self) -> tuple[Tensor, ...]:
        """A model's inputs of one row that the others are compared with, each (1, ...), on the device."""

    def typical_values(self, column: str) -> list[Any]:
        """Cells of a column, over its range in training; None among them if cells were missing there. Perhaps none."""

    def encoded_cell(self, column: str, value: Any) -> tuple[Tensor, ...]:
        """A model's inputs of one row with this cell in a column, each (1, ...), on the device."""
