"""From spooled rows to a store: split, encoder, and the blocks of the encoded rows. Each rank does its share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from dist_train.config.schema import DataConfig
from dist_train.data.cells.readings import with_latest_dates
from dist_train.data.encoding.encoder import Encoder, fit_spec
from dist_train.data.encoding.findings import examine, warn_of_columns
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.data.splits.split import SPLITS, FractionSplit, Parts
from dist_train.data.splits.split_by_group import GroupRows, GroupSplit
from dist_train.data.splits.split_by_time import TimeSplit
from dist_train.data.stores.spool import Chunk, Spool
from dist_train.data.stores.store import num_blocks, rows_of_block, tensor_files
from dist_train.data.tables.classes import check_training_rows
from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError

# Texts of a column that are counted; more take too much memory, and are no categories.
MAX_DISTINCT = 1_000_000

_TRAIN, _TEST = SPLITS.index("train"), SPLITS.index("test")


Rule = FractionSplit | TimeSplit | GroupSplit
_RULES: dict[str, type[FractionSplit] | type[TimeSplit] | type[GroupSplit]] = {
    "fraction": FractionSplit,
    "time": TimeSplit,
    "group": GroupSplit,
}


@dataclass(frozen=True)
class TableSplit:
    """Which rows of a table are in which split.

    `rule` says the part of each row, and `codes_of_parts` what split that is; None where a column says the split.
    `all_in` is the index of the split that all rows are in, if they are. `before` counts, for each chunk, the rows of
    each split that come before it, and those of all rows in the end, (chunks + 1, splits).
    """

    rule: Rule | None
    codes_of_parts: Tensor
    before: Tensor
    all_in: int | None = None

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each split."""
        return dict(zip(SPLITS, self.before[-1].tolist(), strict=True))

    def codes(self, spool: Spool, chunk: Chunk) -> Tensor:
        """Index in SPLITS of each row of a chunk; IN_NONE: it is in no split."""
        if self.all_in is not None:
            return torch.full((chunk.num_rows,), self.all_in, dtype=torch.uint8)
        if self.rule is None:
            return spool.split_codes(chunk)
        return self.codes_of_parts[_parts(spool, chunk, self.rule)]

    def pack(self) -> dict[str, Any]:
        """As JSON types; `unpack` reads it."""
        kind = next((kind for kind, type_ in _RULES.items() if isinstance(self.rule, type_)), None)
        return {
            "kind": kind,
            "rule": self.rule and self.rule.pack(),
            "codes_of_parts": self.codes_of_parts.tolist(),
            "before": self.before.tolist(),
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> TableSplit:
        """What `pack` packed."""
        rule = _RULES[packed["kind"]].unpack(packed["rule"]) if packed["kind"] else None
        codes = torch.tensor(packed["codes_of_parts"], dtype=torch.uint8)
        return cls(rule, codes, torch.tensor(packed["before"]))


def _parts(spool: Spool, chunk: Chunk, rule: Rule) -> Tensor:
    """Part of each row of a chunk."""
    if isinstance(rule, TimeSplit):
        return rule.parts(spool.times(chunk))
    if isinstance(rule, GroupSplit):
        return rule.parts(spool.groups(chunk))
    return rule.parts(chunk.first_row, _strata(spool, chunk))


def _strata(spool: Spool, chunk: Chunk) -> Tensor:
    """Class of each row, -1 where a column says that it is a test row."""
    targets = spool.targets(chunk)
    return targets.masked_fill(spool.split_codes(chunk) == _TEST, -1) if spool.has_split_column else targets


def whole_table(spool: Spool, split: str) -> TableSplit:
    """All rows in one split."""
    return _counted(spool, TableSplit(None, torch.empty(0, dtype=torch.uint8), torch.empty(0), SPLITS.index(split)))


def split_of_column(spool: Spool) -> TableSplit:
    """The split as a column says it, its rows counted by this rank alone."""
    return _counted(spool, TableSplit(None, torch.empty(0, dtype=torch.uint8), torch.empty(0)))


def _counted(spool: Spool, split: TableSplit) -> TableSplit:
    counts = [torch.bincount(split.codes(spool, chunk), minlength=len(SPLITS)) for chunk in spool.chunks]
    return replace(split, before=torch.stack([torch.zeros(len(SPLITS), dtype=torch.int64), *counts]).cumsum(0))


@dataclass(frozen=True)
class Fitted:
    """What was fitted to a table."""

    spec: FeatureSpec
    split: TableSplit
    weighted: bool = False

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each split."""
        return self.split.num_rows

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return rows_of_block(self.spec)

    def pack(self) -> dict[str, Any]:
        """As JSON types; `unpack` reads it."""
        return {"spec": self.spec.to_json(), "split": self.split.pack(), "weighted": self.weighted}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Fitted:
        """What `pack` packed."""
        split = TableSplit.unpack(packed["split"])
        return cls(FeatureSpec.from_json(packed["spec"]), split, packed["weighted"])


def fit(
    spool: Spool,
    data: DataConfig,
    class_names: list[str],
    collectives: Collectives,
    *,
    seed: int,
    show: Callable[[int], None],
) -> Fitted:
    """Split the table and fit a spec to its training rows.

    `show` is told of the rows that this rank has gone through, each of them several times. Raises Stopped when the
    ranks have agreed to stop.
    """
    split = split_table(spool, data, class_names, collectives, seed=seed, source="the table", show=show)
    spec = fit_table(
        spool, split, data, class_names, collectives, source="the table", max_distinct=MAX_DISTINCT, show=show
    )
    return Fitted(spec, split, spool.weighted)


def split_table(
    spool: Spool,
    data: DataConfig,
    class_names: Sequence[str],
    collectives: Collectives,
    *,
    seed: int,
    source: str,
    show: Callable[[int], None] = lambda _rows: None,
) -> TableSplit:
    """Split the table as the configuration says; UserError when there is too little to train on, or to test on."""
    begin, own = _own_chunks(spool, collectives, show)
    parts = _parts_of(data)
    rule = _fitted_rule(spool, data, parts, len(class_names), collectives, own, seed=seed, source=source)
    unfinished = TableSplit(rule, parts.codes, torch.empty(0))
    of_chunks = torch.zeros((len(spool.chunks), len(SPLITS)), dtype=torch.int64)
    of_classes = torch.zeros(len(class_names), dtype=torch.int64)

    def count() -> Iterator[int]:
        for index, chunk in enumerate(own(), begin):
            targets = spool.targets(chunk)
            codes = unfinished.codes(spool, chunk)
            of_chunks[index] = torch.bincount(codes, minlength=len(SPLITS))[: len(SPLITS)]  # not the rows in none
            of_classes.add_(torch.bincount(targets[codes == _TRAIN], minlength=len(class_names)))
            yield chunk.num_rows

    collectives.lockstep(count())
    ends = collectives.all_reduce(of_chunks).cumsum(0)
    if isinstance(rule, (TimeSplit, GroupSplit)):
        _refuse_empty(data, parts, spool.num_rows, ends[-1], source)
    occurring = [index for index, name in enumerate(class_names) if name in spool.classes]
    of_classes = collectives.all_reduce(of_classes)[occurring]
    check_training_rows(of_classes, [class_names[index] for index in occurring], source)
    return replace(unfinished, before=torch.cat([torch.zeros_like(ends[:1]), ends]))


def _parts_of(data: DataConfig) -> Parts:
    in_time = data.time_column is not None
    test_fraction = 0.0 if data.split_column is not None else data.test_fraction
    return Parts(data.validation_fraction, test_fraction, data.folds, data.fold, in_time)


def _fitted_rule(
    spool: Spool,
    data: DataConfig,
    parts: Parts,
    num_classes: int,
    collectives: Collectives,
    own: Callable[[], Iterator[Chunk]],
    *,
    seed: int,
    source: str,
) -> Rule | None:
    """What says the part of each row; None where a column says the split. Each rank looks at its own chunks."""
    if data.time_column is not None:
        spool.check_times(data.time_column, source)
    if data.group_column is not None:
        return GroupSplit.fit(
            lambda: (
                GroupRows(spool.groups(c), spool.targets(c), spool.times(c) if data.time_column else None)
                for c in own()
            ),
            collectives,
            borders=parts.borders,
            seed=seed,
        )
    if data.time_column is not None:
        return TimeSplit.fit(lambda: (spool.times(chunk) for chunk in own()), collectives, borders=parts.borders)
    if data.split_column is not None and data.folds is None:
        return None
    return FractionSplit.fit(
        lambda: ((chunk.first_row, _strata(spool, chunk)) for chunk in own()),
        num_classes,
        collectives,
        borders=parts.borders,
        seed=seed,
    )


def _refuse_empty(data: DataConfig, parts: Parts, num_rows: int, counts: Tensor, source: str) -> None:
    """UserError where whole groups, or rows of one time, leave a split without the rows that it should have."""
    borders = parts.borders(num_rows)
    wanted = {"test": borders[0], "valid": borders[1] - borders[0]}
    empty = [name for name, wish in wanted.items() if wish and not counts[SPLITS.index(name)]]
    if empty:
        column, what = (data.group_column, "groups") if data.group_column else (data.time_column, "times")
        raise UserError(
            f"{source}: column {column!r} has too few distinct {what}: no rows are left "
            f"for the {empty[0]} split, which should have {wanted[empty[0]]:,} of {num_rows:,}"
        )


def fit_table(
    spool: Spool,
    split: TableSplit,
    data: DataConfig,
    class_names: Sequence[str],
    collectives: Collectives,
    *,
    source: str,
    max_distinct: int | None = None,
    show: Callable[[int], None] = lambda _rows: None,
) -> FeatureSpec:
    """Fit a spec to the training rows, each rank to its share of them; see `fit_spec`."""
    _, own = _own_chunks(spool, collectives, show)

    def pieces(names: Sequence[str]) -> Iterator[pl.DataFrame]:
        for chunk in own():
            yield spool.frame(chunk, names, readings).filter(pl.Series((split.codes(spool, chunk) == _TRAIN).numpy()))

    def seconds(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        for chunk in own():
            yield spool.numbers(chunk, columns).filter(pl.Series((split.codes(spool, chunk) == _TRAIN).numpy()))

    readings = with_latest_dates(spool.kinds.readings, seconds, collectives)
    spec = fit_spec(
        pieces,
        spool.kinds,
        class_names,
        collectives,
        max_categories=data.max_categories,
        source=source,
        max_distinct=max_distinct,
        numeric_transform=data.numeric_transform,
        hash_buckets=data.hash_buckets,
        num_rows=split.num_rows[SPLITS[_TRAIN]],
    )

    def labelled() -> Iterator[tuple[Callable[[Sequence[str]], pl.DataFrame], np.ndarray[Any, Any]]]:
        for chunk in own():
            training = pl.Series((split.codes(spool, chunk) == _TRAIN).numpy())
            read = partial(lambda chunk, rows, names: spool.frame(chunk, names, readings).filter(rows), chunk, training)
            yield read, spool.targets(chunk).numpy()[training.to_numpy()]

    lines = examine(labelled(), spec, spool.padded, collectives)
    if collectives.is_main:
        warn_of_columns(lines, data)
    return replace(spec, readings=readings)


def _own_chunks(
    spool: Spool, collectives: Collectives, show: Callable[[int], None]
) -> tuple[int, Callable[[], Iterator[Chunk]]]:
    """This rank's share of the chunks: the index of the first, and what goes through them."""
    begin, end = split_evenly(0, len(spool.chunks), collectives.size)[collectives.rank]

    def own() -> Iterator[Chunk]:
        for chunk in spool.chunks[begin:end]:
            yield chunk
            show(chunk.num_rows)

    return begin, own


@dataclass(frozen=True)
class Block:
    """One block of a split: the bytes of its tensors by name, and their SHA-256."""

    split: str
    number: int
    data: dict[str, bytes]

    @property
    def sha256(self) -> dict[str, str]:
        """By name of the tensor."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.data.items()}


def encode_blocks(
    spool: Spool, fitted: Fitted, wanted: Mapping[str, Sequence[int]], write: Callable[[Block], None]
) -> Iterator[int]:
    """Encode the wanted blocks of each split and hand them to `write`; yields the rows of each step."""
    block_rows, encoder = fitted.block_rows, Encoder(fitted.spec)
    shares = [_BlockWriter(split, fitted, index, set(wanted[split]), write) for index, split in enumerate(SPLITS)]
    for number, chunk in enumerate(spool.chunks):
        starts, stops = fitted.split.before[number].tolist(), fitted.split.before[number + 1].tolist()
        if not any(share.wants(start, stop) for share, start, stop in zip(shares, starts, stops, strict=True)):
            continue
        codes = fitted.split.codes(spool, chunk)
        tensors = _encoded(spool, chunk, encoder)
        for index, share in enumerate(shares):
            rows = (codes == index).nonzero().squeeze(1)
            share.take(starts[index], {name: values[rows.numpy()] for name, values in tensors.items()})
        yield chunk.num_rows
    assert not any(share.pending for share in shares), f"blocks of {block_rows} rows were left unfinished"


def _encoded(spool: Spool, chunk: Chunk, encoder: Encoder) -> dict[str, np.ndarray[Any, Any]]:
    inputs = encoder.to_arrays(spool.frame(chunk, encoder.names, encoder.spec.readings), spool.source(chunk))
    rows = torch.arange(chunk.first_row, chunk.first_row + chunk.num_rows)
    tensors = inputs._asdict() | {"targets": spool.targets(chunk), "rows": rows}
    if spool.weighted:
        tensors["weights"] = spool.weights(chunk)
    files = tensor_files(encoder.spec, weighted=spool.weighted)
    return {name: tensors[name].numpy().astype(dtype) for name, (dtype, _) in files.items()}


class _BlockWriter:
    """The blocks of one split that this rank makes, of which at most one is in the making."""

    def __init__(
        self, split: str, fitted: Fitted, index: int, wanted: set[int], write: Callable[[Block], None]
    ) -> None:
        self.pending: list[dict[str, np.ndarray[Any, Any]]] = []
        self._split = split
        self._block_rows = fitted.block_rows
        self._num_rows = int(fitted.split.before[-1, index])
        self._wanted = wanted
        self._write = write

    def wants(self, start: int, stop: int) -> bool:
        """Whether rows `start` to `stop` of the split belong to a wanted block."""
        return start < stop and any(
            number in self._wanted for number in range(start // self._block_rows, num_blocks(stop, self._block_rows))
        )

    def take(self, start: int, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        """The next rows of the split, from row `start` of it on."""
        stop = start + len(tensors["targets"])
        while start < stop:
            number = start // self._block_rows
            end = min((number + 1) * self._block_rows, self._num_rows)
            count = min(stop, end) - start
            if number in self._wanted:
                self.pending.append({name: values[:count] for name, values in tensors.items()})
                if start + count == end:
                    parts, self.pending = self.pending, []
                    data = {name: np.concatenate([part[name] for part in parts]).tobytes() for name in tensors}
                    self._write(Block(self._split, number, data))
            tensors = {name: values[count:] for name, values in tensors.items()}
            start += count
