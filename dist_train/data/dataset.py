"""The data of a run: read, checked, split, encoded, in memory or in a store. `load_dataset` is the order of things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dist_train.config.schema import DataConfig
from dist_train.data.encoding.encoder import Encoder, Inputs, smallest_int
from dist_train.data.encoding.findings import described_columns
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.data.files.readers import read_header, read_index_names
from dist_train.data.sources import MappedRows, ResidentRows, resident
from dist_train.data.splits.split import SPLITS
from dist_train.data.stores.batches import InMemory
from dist_train.data.stores.prepare import TableSplit, fit_table, split_of_column, split_table, whole_table
from dist_train.data.stores.spool import Spool, read_in_memory, with_numbers
from dist_train.data.stores.store import Settings, Store, is_store
from dist_train.data.stores.target_bins import with_target_edges
from dist_train.data.tables.classes import index_of_classes
from dist_train.data.tables.columns import Columns, Unit, UnitFacts, check_classes, class_places, kinds_of
from dist_train.data.tables.inputs import columns_of, whole_file
from dist_train.data.tables.table import TRAINED_ON, ColumnKinds, locate, no_number, require_names
from dist_train.data.tables.weights import require_some_weight
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.system.console import log
from dist_train.system.files import sha256_of
from dist_train.system.progress_bar import progress_bar


@dataclass(frozen=True)
class Table:
    """A table in memory, as it was read. `batches` gives back what was encoded; `sha256` is the file's."""

    spool: Spool
    batches: InMemory
    class_names: list[str]
    source: str
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """Encoded rows by split, on the device or in a store, and the spec that they were encoded by.

    `columns`: what the columns became, in words.
    """

    splits: dict[str, ResidentRows | MappedRows]
    spec: FeatureSpec
    sha256: str
    columns: Sequence[str] = ()


def load_dataset(
    data: DataConfig,
    collectives: Collectives,
    *,
    seed: int,
    dtype: torch.dtype,
    spec: FeatureSpec | None = None,
    target_bins: int | None = None,
) -> Dataset:
    """Read the table, fit a spec to the training rows unless one is given, and encode all splits.

    `target_bins`: bins of each numeric column that are to be fitted by the target, at most; None: none. A store has
    none.

    Raises:
        UserError: the table, or the configuration for it, has a mistake.
        Stopped: the ranks have agreed to stop.
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
        table = collectives.run_on_all(lambda: read_labelled(data, spec))
        split = split_table(table.spool, data, table.class_names, collectives, seed=seed, source=table.source)
    collectives.raise_if_stop_agreed()
    if spec is None:
        for remark in table.spool.kinds.remarks if collectives.is_main else ():
            log.info("%s", remark)
        with heartbeat.phase("encoder fitting"):
            spec = fit_table(table.spool, split, data, table.class_names, collectives, source=table.source)
            if target_bins:
                spec = with_target_edges(spec, table.spool, split, target_bins, collectives, source=table.source)
    fitted = spec
    with heartbeat.phase("encoding the data"):
        splits = collectives.run_on_all(lambda: encoded_rows(table, split, fitted, SPLITS, collectives.device, dtype))
    collectives.raise_if_stop_agreed()
    _require_some_weight(splits, data)
    return Dataset({**splits}, fitted, table.sha256, described_columns(fitted, table.spool.kinds, data))


def read_labelled(data: DataConfig, spec: FeatureSpec | None = None) -> Table:
    """Read the table of a configuration and check what training relies on.

    Columns are numbers or categories as `spec` says, or else by all of their cells.

    Raises:
        UserError: the table, or the configuration for it, has a mistake.
    """
    file, source = locate(data.path), data.path
    header = read_header(file)
    if not header:
        raise UserError(f"{source}: the table has no rows")
    columns = columns_of(header, data, source, read_index_names(file))
    if spec:
        columns = _columns_of_spec(columns, header, spec, source)
    unit = whole_file(file, source)
    facts, batches = read_in_memory(unit, columns)
    if not facts.batches:
        raise UserError(f"{source}: the table has no rows")
    found = [(unit, facts)]
    class_names = check_classes(found, data.target)
    if spec:
        known = index_of_classes(spec.class_names, class_names)
        unknown = [name for name in class_names if name not in known]
        if unknown:
            raise UserError(f"{source}: class {unknown[0]!r} was not there when the encoder was fitted")
        class_names = list(spec.class_names)
    kinds = _kinds_of_spec(found, spec) if spec else kinds_of(found, columns)
    held = InMemory(list(with_numbers(batches, kinds, source)))
    spool = Spool(held, found, kinds, class_names, weighted=columns.weight is not None)
    return Table(spool, held, class_names, source, sha256_of(file))


def read_for_evaluation(file: Path, data: DataConfig, spec: FeatureSpec, split: str) -> tuple[Table, TableSplit]:
    """Read another file, with the classes of the model, and say which of its rows are to be evaluated on.

    Those are the rows of `split` where the file has the split column, else all.

    Raises:
        UserError: the file does not fit the model, or has no such rows.
    """
    source, header = str(file), read_header(file)
    require_names(header, [data.target], source, "the target")
    column = data.split_column if data.split_column in header else None
    weight = data.weight if data.weight in header else None
    if data.weight and not weight:
        log.warning("%s: there is no column %r (data.weight): every row counts alike", source, data.weight)
    wanted = Columns([], data.target, column, data.categorical, data.missing_values, weight)
    unit = whole_file(file, source)
    facts, batches = read_in_memory(unit, _columns_of_spec(wanted, header, spec, source))
    found = [(unit, facts)]
    places = class_places(found, data.target)
    known = index_of_classes(spec.class_names, places)
    unknown = [(row, text) for text, (_, row) in places.items() if text not in known]
    if unknown:
        row, text = min(unknown)
        raise UserError(
            f"{file}: column {data.target!r}, data row {row + 1}: {text!r} is not a class; "
            f"the model knows {', '.join(spec.class_names)}"
        )
    held = InMemory(batches)
    spool = Spool(held, found, _kinds_of_spec(found, spec), spec.class_names, weighted=weight is not None)
    chosen = split_of_column(spool) if column else whole_table(spool, split)
    if not chosen.num_rows[split]:
        raise UserError(f"{file}: no rows to evaluate on")
    return Table(spool, held, list(spec.class_names), source, ""), chosen


def encoded_rows(
    table: Table,
    split: TableSplit,
    spec: FeatureSpec,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, ResidentRows]:
    """Encode a table, whose batches are released on the way; the rows of the named splits are put on the device.

    All rows are encoded, so that a bad cell is found in any of them.
    """
    encoder = Encoder(spec)
    parts = {name: _Rows(encoder, split.num_rows[name], weighted=table.spool.weighted) for name in names}
    for chunk in table.spool.chunks:
        codes, targets = split.codes(table.spool, chunk), table.spool.targets(chunk)
        weights = table.spool.weights(chunk) if table.spool.weighted else None
        inputs = encoder.to_arrays(
            table.spool.frame(chunk, encoder.names, spec.readings), table.source, chunk.first_row
        )
        table.batches.release(chunk.batch)
        for name, part in parts.items():
            part.add((codes == SPLITS.index(name)).nonzero().squeeze(1), inputs, targets, weights, chunk.first_row)
    return {name: part.on(device, dtype) for name, part in parts.items()}


class _Rows:
    """Encoded rows of a split in the making."""

    def __init__(self, encoder: Encoder, count: int, *, weighted: bool) -> None:
        spec = encoder.spec
        self._num_classes = spec.num_classes
        self._inputs = encoder.empty(count)
        self._targets = torch.empty(count, dtype=smallest_int(spec.num_classes))
        self._weights = torch.empty(count, dtype=torch.float64) if weighted else None
        self._numbers = torch.empty(count, dtype=torch.int64)
        self._done = 0

    def add(self, chosen: Tensor, inputs: Inputs, targets: Tensor, weights: Tensor | None, first_row: int) -> None:
        """The rows `chosen` of a chunk."""
        place = slice(self._done, self._done + len(chosen))
        for own, of_chunk in zip(self._inputs, inputs, strict=True):
            own[place] = of_chunk[chosen]
        self._targets[place] = targets[chosen]
        if self._weights is not None and weights is not None:
            self._weights[place] = weights[chosen]
        self._numbers[place] = chosen + first_row
        self._done += len(chosen)

    def on(self, device: torch.device, dtype: torch.dtype) -> ResidentRows:
        return resident(self._inputs, self._targets, self._numbers, self._num_classes, device, dtype, self._weights)


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
    if seed != store.settings.seed and data.split_column is None and data.time_column is None:
        if data.split_seed is not None:
            raise UserError(
                f"{data.path}: was split with the seed {store.settings.seed}: set data.split_seed to it or to null, "
                "or prepare another store"
            )
        if collectives.is_main:
            log.warning("the split is that of the store, made with the seed %d", store.settings.seed)
    splits: dict[str, ResidentRows | MappedRows] = {
        name: MappedRows(store.tensors(name), store.to_inputs, collectives.device, dtype) for name in SPLITS
    }
    _require_some_weight(splits, data)
    return Dataset(splits, store.spec, store.sha256, described_columns(store.spec, None, data))


def _require_some_weight(splits: Mapping[str, ResidentRows | MappedRows], data: DataConfig) -> None:
    for name, rows in splits.items():
        require_some_weight(rows.weights, data.weight, data.path, name)


def _columns_of_spec(columns: Columns, header: Sequence[str], spec: FeatureSpec, source: str) -> Columns:
    """The columns of a model's spec; its categories are read as text."""
    require_names(header, spec.names, source, TRAINED_ON)
    words = set(columns.missing_values)
    categories = {c.name: list(c.categories) for c in spec.categorical if words.intersection(c.categories)}
    if words.intersection(spec.class_names):
        categories[columns.target] = list(spec.class_names)
    return replace(
        columns,
        features=spec.names,
        categorical=[column.name for column in spec.categorical],
        numbers=_plain_numbers(spec),
        categories=categories,
        left_out={},
        formats={reading.column: reading.form for reading in spec.readings},
    )


def _plain_numbers(spec: FeatureSpec) -> list[str]:
    """Columns of numbers that have no form."""
    made = spec.columns_of_features
    return [column.name for column in spec.numeric if column.name not in made]


def _kinds_of_spec(found: Sequence[tuple[Unit, UnitFacts]], spec: FeatureSpec) -> ColumnKinds:
    numeric = tuple(column.name for column in spec.numeric)
    for unit, facts in found:
        for name in _plain_numbers(spec):
            stray = facts.columns[name].stray if facts.batches else None
            if stray:
                raise no_number(name, unit.source, *stray)
    return ColumnKinds(numeric, tuple(column.name for column in spec.categorical), readings=spec.readings)
