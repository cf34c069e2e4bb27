"""Classification of the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from dist_train.config.auto import TableSize, with_auto_values
from dist_train.config.compatibility import FORMATS, require_format
from dist_train.config.families import target_bins
from dist_train.config.rules import require_columns_of_model, split_seed
from dist_train.config.schema import DataConfig, JobConfig, ReportConfig
from dist_train.data.cells.readings import with_features
from dist_train.data.dataset import (
    Dataset,
    encoded_rows,
    load_dataset,
    open_store,
    read_for_evaluation,
    read_labelled,
)
from dist_train.data.encoding.encoder import Encoder, with_missing_cells
from dist_train.data.encoding.scaling import scaled
from dist_train.data.encoding.spec import FIRST_CATEGORY, MISSING, FeatureSpec, spec_of_encoder
from dist_train.data.encoding.unfamiliar import Unfamiliar, unfamiliar_cells
from dist_train.data.files.readers import read_header
from dist_train.data.sources import MappedRows, ResidentRows, resident
from dist_train.data.stores.prepare import split_table
from dist_train.data.stores.store import is_store
from dist_train.data.tables.table import TRAINED_ON, locate, read_table, require_columns, require_names
from dist_train.data.tables.weights import require_some_weight
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.models.registry import build_model
from dist_train.system.console import log
from dist_train.tasks.base import Description
from dist_train.tasks.classification import Classification
from dist_train.training.metrics import (
    check_metrics,
    unweighted_metrics,
)
from dist_train.training.precision import dtype_of
from dist_train.training.protocols import Source


class TabularTask(Classification):
    """A table with a column to predict. `dataset` holds the spec of its columns and the encoded rows of each split."""

    def __init__(self, config: JobConfig, dataset: Dataset, collectives: Collectives) -> None:
        super().__init__(config, dataset.spec.class_names, dataset.splits, collectives)
        self.spec = dataset.spec
        self._encoder = Encoder(dataset.spec)
        self.splits: Mapping[str, ResidentRows | MappedRows] = dataset.splits
        self.fingerprint = dataset.sha256
        self._columns = list(dataset.columns)
        if config.data.weight and dataset.splits:
            self._check_class_weights()

    @classmethod
    def load(cls, config: JobConfig, collectives: Collectives, fitted: Description | None = None) -> TabularTask:
        """Read the table, split it, fit the encoder to the training rows unless it was `fitted`, encode all rows.

        Raises:
            UserError: the table, or the configuration for it, has a mistake.
            Stopped: the ranks have agreed to stop.
        """
        check_metrics(config.evaluation.metrics)  # before the data are read
        if config.report.segments:
            collectives.run_on_all(lambda: require_segments(config.data, config.report))
        unweighted = unweighted_metrics(config.evaluation.metrics) if config.data.weight else []
        if unweighted and collectives.is_main:
            log.warning(
                "%s: a registered metric without a parameter `weights` counts every row alike", ", ".join(unweighted)
            )
        dataset = load_dataset(
            config.data,
            collectives,
            seed=split_seed(config),
            dtype=dtype_of(config.train.precision),
            spec=_spec_of(fitted) if fitted else None,
            target_bins=target_bins(config.model),
        )
        require_columns_of_model(config.report, dataset.spec.names)
        return cls(with_auto_values(config, _size_of(dataset)), dataset, collectives)

    @classmethod
    def restore(cls, config: JobConfig, collectives: Collectives, fitted: Description, fingerprint: str) -> TabularTask:
        """The task of a trained model, without rows."""
        return cls(config, Dataset({}, _spec_of(fitted), fingerprint), collectives)

    @property
    def num_inputs(self) -> int:
        """Feature columns of the table."""
        return self.spec.num_columns

    def model(self, device: torch.device | None = None) -> nn.Module:
        """The classifier with initial weights that are a function of the seed."""
        with self.initial_values():
            model = build_model(self.spec, self._config.model, seed=self._config.run.seed)
        return model.to(device or self._collectives.device, self._dtype)

    def description(self) -> Description:
        """The spec of the columns."""
        return {"task": "tabular", "format": FORMATS["tabular task"], "spec": self.spec.to_json()}

    def matches(self, description: Description) -> bool:
        """Whether a task described so encodes every table as this one does, and has the same classes."""
        same_task: bool = description["task"] == "tabular"
        return same_task and self.spec.matches(_spec_of(description))

    def labelled(self, split: str, file: Path | None = None) -> ResidentRows | MappedRows:
        """A split of the run's own data, or the rows of another file: all of them unless it has the split column."""
        path = str(file or self._config.data.path)
        rows = self._stored(path, split) if is_store(path) else self._encoded(split, file)
        require_some_weight(rows.weights, self._config.data.weight, path, split)
        return rows

    def _encoded(self, split: str, file: Path | None) -> ResidentRows:
        data, collectives = self._config.data, self._collectives
        if file is not None:
            table, chosen = collectives.run_on_all(
                lambda: read_for_evaluation(locate(str(file)), data, self.spec, split)
            )
        else:
            table = collectives.run_on_all(lambda: read_labelled(data, self.spec))
            seed = split_seed(self._config)
            chosen = split_table(table.spool, data, table.class_names, collectives, seed=seed, source=table.source)
            if table.sha256 != self.fingerprint:
                log.warning("%s is not the file that the model was trained on", table.source)
        return collectives.run_on_all(
            lambda: encoded_rows(table, chosen, self.spec, [split], collectives.device, self._dtype)
        )[split]

    @property
    def input_columns(self) -> Sequence[str]:
        """Feature columns."""
        return self.spec.names

    @property
    def columns_of_inputs(self) -> Sequence[Sequence[str]]:
        """Of numbers, flags and codes."""
        return self.spec.columns_of_inputs

    @property
    def continuous_inputs(self) -> Sequence[bool]:
        """Numbers and flags, not codes."""
        return True, True, False

    def typical_inputs(self) -> tuple[Tensor, ...]:
        """Medians, nothing missing, and of each categorical column the most frequent code of the training rows."""
        numeric, flags, codes = self._encoder.empty(1)
        numeric.zero_()  # what the encoder makes of the median
        flags.zero_()
        for index, column in enumerate(self.spec.categorical):
            known = column.counts or [0] * FIRST_CATEGORY + [1]  # categories stand in the order of their counts
            codes[0, index] = known.index(max(known)) if column.size > FIRST_CATEGORY else MISSING
        return tuple(x.to(self._collectives.device) for x in (numeric, flags, codes))

    def typical_values(self, column: str) -> list[Any]:
        """Quantiles of a number at 5, 15, ... 95 %, the ten most frequent categories; none of a date or an amount."""
        for number in self.spec.numeric:
            if number.name == column and number.quantiles and column not in self.spec.columns_of_features:
                known = np.array(number.quantiles)
                chosen = np.interp(np.linspace(0.05, 0.95, 10), np.linspace(0, 1, len(known)), known)
                return [*np.unique(chosen).tolist(), *([None] if number.has_missing_flag else [])]
        for words in self.spec.categorical:
            if words.name == column:
                return [*words.categories[:10], *([None] if words.seen_in_training[MISSING] else [])]
        return []

    def encoded_cell(self, column: str, value: Any) -> tuple[Tensor, ...]:
        """One row whose other cells are those of the typical row."""
        numeric, flags, codes = (x.clone() for x in self.typical_inputs())
        flag = 0
        for index, number in enumerate(self.spec.numeric):
            if number.name == column:
                cell = torch.tensor([0.0 if value is None else value], dtype=torch.float64)
                numeric[0, index] = 0.0 if value is None else float(scaled(cell, number))
                if number.has_missing_flag:
                    flags[0, flag] = value is None
            flag += number.has_missing_flag
        for index, words in enumerate(self.spec.categorical):
            if words.name == column:
                known = value in words.categories
                place = FIRST_CATEGORY + words.categories.index(value) if known else words.code_of_others(str(value))
                codes[0, index] = MISSING if value is None else place
        return numeric, flags, codes

    def table(self, columns: Sequence[str], report: ReportConfig) -> pl.DataFrame | None:
        """As HasTable; a store has features only, and as the model reads them."""
        data = self._config.data
        if is_store(data.path) and not report.segments:
            return None
        require_segments(data, report)
        return read_table(locate(data.path), data.missing_values, list(dict.fromkeys([*columns, *report.segments])))

    def unfamiliar(self, rows: Source, table: pl.DataFrame | None = None) -> Unfamiliar:
        """Unknown categories, and missing cells in columns that had none in training."""
        return unfamiliar_cells(rows.slice, len(rows), self.spec, table)

    def inputs(self) -> list[str]:
        """The columns by kind, and those that are left out."""
        return self._columns

    def unlabelled(self, table: pl.DataFrame, source: str, first_row: int = 0) -> ResidentRows:
        """Rows to score; cells of text that are a word for "missing" are missing, as in a CSV file."""
        table = with_missing_cells(table, self.spec, self._config.data.missing_values)
        require_columns(table, self.spec.names, source, TRAINED_ON)
        features = with_features(table, self.spec.readings, source, first_row)
        inputs = self._encoder.to_arrays(features, source, first_row)
        targets = torch.zeros(table.height, dtype=torch.int64)
        rows, device = torch.arange(table.height), self._collectives.device
        return resident(inputs, targets, rows, self.spec.num_classes, device, self._dtype)

    def _stored(self, path: str, split: str) -> MappedRows:
        store = open_store(path, self._collectives, [split], spec=self.spec)
        if store.sha256 != self.fingerprint:
            log.warning("%s is not the store that the model was trained on", path)
        return MappedRows(store.tensors(split), store.to_inputs, self._collectives.device, self._dtype)

    def _check_class_weights(self) -> None:
        """A class that the training rows count nothing of has no balanced weight, and nothing to learn from."""
        rows = self.splits["train"]
        counts = torch.bincount(rows.targets, rows.weights, minlength=len(self.class_names)).tolist()
        for name, count in zip(self.class_names, counts, strict=True):
            if not count:
                raise UserError(
                    f"{self._config.data.path}: column {self._config.data.weight!r}: the weight of every training row "
                    f"of class {name!r} is 0 (data.weight)"
                )


def require_segments(data: DataConfig, report: ReportConfig) -> None:
    """UserError where a column of `report.segments` is not there."""
    if is_store(data.path):
        raise UserError(f"report.segments: {data.path} is a store, which holds features only")
    require_names(read_header(locate(data.path)), report.segments, data.path, "report.segments")


def tabular_description_of_format_1(encoder: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Description:
    """The description of a task that was written as an encoder in two files."""
    spec = spec_of_encoder(encoder, {name: tensor.tolist() for name, tensor in tensors.items()})
    return {"task": "tabular", "format": FORMATS["tabular task"], "spec": spec.to_json()}


def _size_of(dataset: Dataset) -> TableSize:
    spec = dataset.spec
    return TableSize(
        rows=len(dataset.splits["train"]),
        num_numeric=spec.num_numeric,
        category_sizes=spec.category_sizes,
        num_classes=spec.num_classes,
    )


def _spec_of(description: Description) -> FeatureSpec:
    require_format("tabular task", description.get("format"), "the model's task")
    return FeatureSpec.from_json(description["spec"])
