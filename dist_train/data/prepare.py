"""From spooled rows to a store: split, encoder, and the blocks of the encoded rows. Each rank does its share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from dist_train.config.schema import DataConfig
from dist_train.data.classes import check_training_rows
from dist_train.data.encoder import Encoder, fit_spec
from dist_train.data.spec import FeatureSpec
from dist_train.data.split import SPLITS, FractionSplit
from dist_train.data.spool import Chunk, Spool
from dist_train.data.store import num_blocks, rows_of_block, tensor_files
from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives

# Texts of a column that are counted; more take too much memory, and are no categories.
MAX_DISTINCT = 1_000_000

_TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class TableSplit:
    """Which rows of a table are in which split.

    `by_fraction` is None where a column says it; `all_in` is the index of the split that all rows are in, if they are.
    `before` counts, for each chunk, the rows of each split that come before it, and those of all rows in the end,
    (chunks + 1, splits).
    """

    by_fraction: FractionSplit | None
    before: Tensor
    all_in: int | None = None

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each split."""
        return dict(zip(SPLITS, self.before[-1].tolist(), strict=True))

    def codes(self, spool: Spool, chunk: Chunk) -> Tensor:
        """Index in SPLITS of each row of a chunk."""
        return _split_codes(spool, chunk, self.by_fraction, self.all_in)


def _split_codes(spool: Spool, chunk: Chunk, by_fraction: FractionSplit | None, all_in: int | None = None) -> Tensor:
    if all_in is not None:
        return torch.full((chunk.num_rows,), all_in, dtype=torch.uint8)
    return by_fraction.codes(chunk.first_row, spool.targets(chunk)) if by_fraction else spool.split_codes(chunk)


def counted_split(spool: Spool, by_fraction: FractionSplit | None, all_in: int | None = None) -> TableSplit:
    """A split, its rows counted by this rank alone."""
    counts = [
        torch.bincount(_split_codes(spool, chunk, by_fraction, all_in), minlength=len(SPLITS)) for chunk in spool.chunks
    ]
    before = torch.stack([torch.zeros(len(SPLITS), dtype=torch.int64), *counts]).cumsum(0)
    return TableSplit(by_fraction, before, all_in)


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
        split = self.split.by_fraction
        packed = split and {"seed": split.seed, "last": split.last_keys.tolist(), "any": split.any_rows.tolist()}
        before = self.split.before.tolist()
        return {"spec": self.spec.to_json(), "split": packed, "before": before, "weighted": self.weighted}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Fitted:
        """What `pack` packed."""
        split = packed["split"]
        fraction_split = split and FractionSplit(split["seed"], torch.tensor(split["last"]), torch.tensor(split["any"]))
        split = TableSplit(fraction_split, torch.tensor(packed["before"]))
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
    """Split the table as its column says, or by fractions; UserError when there is too little to train on."""
    begin, own = _own_chunks(spool, collectives, show)
    split = None
    if data.split_column is None:
        split = FractionSplit.fit(
            lambda: ((chunk.first_row, spool.targets(chunk)) for chunk in own()),
            len(class_names),
            collectives,
            validation_fraction=data.validation_fraction,
            test_fraction=data.test_fraction,
            seed=seed,
        )
    of_chunks = torch.zeros((len(spool.chunks), len(SPLITS)), dtype=torch.int64)
    of_classes = torch.zeros(len(class_names), dtype=torch.int64)

    def count() -> Iterator[int]:
        for index, chunk in enumerate(own(), begin):
            targets = spool.targets(chunk)
            codes = _split_codes(spool, chunk, split)
            of_chunks[index] = torch.bincount(codes, minlength=len(SPLITS))
            of_classes.add_(torch.bincount(targets[codes == _TRAIN], minlength=len(class_names)))
            yield chunk.num_rows

    collectives.lockstep(count())
    occurring = [index for index, name in enumerate(class_names) if name in spool.classes]
    of_classes = collectives.all_reduce(of_classes)[occurring]
    check_training_rows(of_classes, [class_names[index] for index in occurring], source)
    ends = collectives.all_reduce(of_chunks).cumsum(0)
    return TableSplit(split, torch.cat([torch.zeros_like(ends[:1]), ends]))


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
            codes = split.codes(spool, chunk)
            yield spool.frame(chunk, names).filter(pl.Series((codes == _TRAIN).numpy()))

    return fit_spec(
        pieces,
        spool.kinds,
        class_names,
        collectives,
        max_categories=data.max_categories,
        source=source,
        max_distinct=max_distinct,
        numeric_transform=data.numeric_transform,
    )


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
    inputs = encoder.to_arrays(spool.frame(chunk, encoder.names), spool.source(chunk))
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
