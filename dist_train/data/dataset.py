"""The data of a run: read, checked, split, encoded, resident. Read `load_dataset` to see the order of things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from dist_train.config.schema import DataConfig
from dist_train.data.classes import (
    check_training_rows,
    check_whole,
    class_indices,
    first_rows,
    ordered_names,
    target_text,
)
from dist_train.data.encoder import Encoder, Inputs, fit_spec
from dist_train.data.sources import MappedRows, ResidentRows, resident
from dist_train.data.spec import FeatureSpec
from dist_train.data.split import SPLITS, Split, split_by_column, split_by_fraction
from dist_train.data.store import Settings, Store, is_store
from dist_train.data.table import (
    ColumnKinds,
    feature_kinds,
    locate,
    numbers,
    read_table,
    require_columns,
    sha256_of,
)
from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.system.console import log
from dist_train.system.progress_bar import progress_bar

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class LabelledTable:
    """A table with its targets as class indices, (rows,), its splits, and the fingerprint of its file."""

    frame: pl.DataFrame
    targets: Tensor
    class_names: list[str]
    split: Split
    source: str
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """Encoded rows by split, on the device or in a store, and the spec that they were encoded by."""

    splits: dict[str, ResidentRows | MappedRows]
    spec: FeatureSpec
    sha256: str


def load_dataset(
    data: DataConfig,
    collectives: Collectives,
    *,
    seed: int,
    dtype: torch.dtype,
    spec: FeatureSpec | None = None,
) -> Dataset:
    """Read the table, fit a spec to the training rows unless one is given, and encode all splits.

    Raises Stopped when the ranks have agreed to stop.
    """
    heartbeat = collectives.heartbeat
    if data.shuffle_block_rows and collectives.is_main:
        log.warning(
            "data.shuffle_block_rows=%d: neighbouring rows of the table meet in the same batches more often than by "
            "chance; docs/large-tables.md says what that costs",
            data.shuffle_block_rows,
        )
    if is_store(data.path):
        with heartbeat.phase("opening the store"):
            return _load_store(data, collectives, seed=seed, dtype=dtype, spec=spec)
    with heartbeat.phase("reading the data"):
        table = collectives.run_on_all(lambda: load_labelled(data, seed))
    collectives.raise_if_stop_agreed()
    if spec is None:
        with heartbeat.phase("encoder fitting"):
            spec = _fit(table, data, collectives)
    encoder = Encoder(spec)
    with heartbeat.phase("encoding the data"):
        inputs = collectives.run_on_all(lambda: encoder.to_arrays(table.frame, table.source))
    collectives.raise_if_stop_agreed()
    targets = remap_targets(table, spec.class_names)
    splits: dict[str, ResidentRows | MappedRows] = {
        name: rows_of(inputs, targets, table.split[name], spec, collectives.device, dtype) for name in SPLITS
    }
    return Dataset(splits, spec, table.sha256)


def rows_of(
    inputs: Inputs, targets: Tensor, rows: Tensor, spec: FeatureSpec, device: torch.device, dtype: torch.dtype
) -> ResidentRows:
    """The given rows of an encoded table, on the device."""
    chosen = Inputs(*(x[rows] for x in inputs))
    return resident(chosen, targets[rows], rows, spec.num_classes, device, dtype)


def open_store(
    path: str,
    collectives: Collectives,
    splits: Sequence[str],
    *,
    spec: FeatureSpec | None,
    settings: Settings | None = None,
) -> Store:
    """Open a prepared table and check the blocks of some splits; UserError when it is damaged or another one is meant.

    `settings` and `spec` are what its rows must have been prepared by. Raises Stopped when the ranks have agreed to
    stop.
    """

    def opened() -> Store:
        store = Store(Path(path))
        if settings:
            store.require(settings)
        if spec and not spec.matches(store.spec):
            raise UserError(
                f"{path}: was encoded by another encoder than that of the model: give the files that it was made of"
            )
        return store

    store = collectives.run_on_all(opened)
    with progress_bar("verifying the store", store.bytes_of(splits), "bytes", shown=collectives.is_main) as show:
        store.verify(splits, collectives, show)
    return store


def _load_store(
    data: DataConfig,
    collectives: Collectives,
    *,
    seed: int,
    dtype: torch.dtype,
    spec: FeatureSpec | None,
) -> Dataset:
    settings = Settings.of(data, seed=seed)
    store = open_store(data.path, collectives, SPLITS, spec=spec, settings=settings)
    if seed != store.settings.seed and data.split_column is None and collectives.is_main:
        log.warning("the split is that of the store, made with run.seed=%d", store.settings.seed)
    splits: dict[str, ResidentRows | MappedRows] = {
        name: MappedRows(store.tensors(name), store.to_inputs, collectives.device, dtype) for name in SPLITS
    }
    return Dataset(splits, store.spec, store.sha256)


def load_labelled(data: DataConfig, seed: int) -> LabelledTable:
    """Read the table of a configuration and check what training relies on; UserError says what is wrong."""
    file = locate(data.path)
    frame = read_table(file, data.missing_values)
    source = data.path
    if frame.height == 0:
        raise UserError(f"{source}: the table has no rows")
    named = [data.target, *data.drop, *data.categorical, *([data.split_column] if data.split_column else [])]
    require_columns(frame, named, source, "named in the configuration")
    targets, class_names = _targets(frame[data.target], source)
    split = (
        split_by_column(frame[data.split_column], source)
        if data.split_column
        else split_by_fraction(
            targets, validation_fraction=data.validation_fraction, test_fraction=data.test_fraction, seed=seed
        )
    )
    counts = torch.bincount(targets[split["train"]], minlength=len(class_names))
    check_training_rows(counts, class_names, source)
    return LabelledTable(frame, targets, class_names, split, source, sha256_of(file))


def read_for_evaluation(
    file: Path, data: DataConfig, class_names: Sequence[str], split: str
) -> tuple[pl.DataFrame, Tensor, Tensor]:
    """Another file, its class indices, and the numbers of the rows to evaluate on.

    Those are the rows of `split` where the file has the split column, else all.
    """
    frame = read_table(file, data.missing_values)
    require_columns(frame, [data.target], str(file), "the target")
    rows = torch.arange(frame.height)
    if data.split_column and data.split_column in frame.columns:
        rows = split_by_column(frame[data.split_column], str(file))[split]
    if len(rows) == 0:
        raise UserError(f"{file}: no rows to evaluate on")
    text = _whole_target(frame[data.target], str(file))
    unknown = ~text.is_in(class_names)
    if unknown.any():
        row = int(unknown.arg_max() or 0)
        raise UserError(
            f"{file}: column {data.target!r}, data row {row + 1}: {text[row]!r} is not a class; "
            f"the model knows {', '.join(class_names)}"
        )
    return frame, class_indices(text, class_names), rows


def remap_targets(table: LabelledTable, class_names: Sequence[str]) -> Tensor:
    """Class indices of a table in the order of an encoder's class names."""
    unknown = [name for name in table.class_names if name not in class_names]
    if unknown:
        raise UserError(f"{table.source}: class {unknown[0]!r} was not there when the encoder was fitted")
    return torch.tensor([class_names.index(name) for name in table.class_names])[table.targets]


def _fit(table: LabelledTable, data: DataConfig, collectives: Collectives) -> FeatureSpec:
    not_features = [data.target, *data.drop, *([data.split_column] if data.split_column else [])]
    frame, kinds = collectives.run_on_all(lambda: _features(table, not_features, data.categorical))
    rows = table.split["train"]
    begin, end = split_evenly(0, len(rows), collectives.size)[collectives.rank]
    own = frame[rows[begin:end].numpy()]
    return fit_spec(
        lambda names: own.select(names).iter_slices(_ROWS_AT_ONCE),
        kinds,
        table.class_names,
        collectives,
        max_categories=data.max_categories,
        source=table.source,
    )


def _features(
    table: LabelledTable, not_features: list[str], categorical: list[str]
) -> tuple[pl.DataFrame, ColumnKinds]:
    """Feature columns by kind, numbers already parsed: from the whole table, so that a bad cell is named by its row."""
    kinds = feature_kinds(table.frame, not_features, categorical, table.source)
    parsed = [pl.Series(name, numbers(table.frame[name], table.source).numpy()) for name in kinds.numeric]
    return pl.DataFrame([*parsed, *(table.frame[name] for name in kinds.categorical)]), kinds


def _targets(column: pl.Series, source: str) -> tuple[Tensor, list[str]]:
    text = _whole_target(column, source)
    names = ordered_names(text.unique().to_list(), column.name, source)
    return class_indices(text, names), names


def _whole_target(column: pl.Series, source: str) -> pl.Series:
    text = target_text(column, source)
    check_whole({name: (source, row) for name, row in first_rows(text).items()}, column.name)
    return text
