"""What the columns of a table became, in words, and what looks wrong about them. Nothing is changed by it.

Warnings: a column that alone tells the class of every training row, identifiers, numbers that are written like codes,
columns named like a split, and words that no longer mean "missing".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pyarrow.compute

from dist_train.config.schema import DataConfig
from dist_train.data.encoding.spec import UNKNOWN, CategoricalColumn, FeatureSpec
from dist_train.data.tables.table import ColumnKinds, arrow_text
from dist_train.distributed.collectives import Collectives
from dist_train.system.console import log

Array = np.ndarray[Any, np.dtype[Any]]
Pieces = Iterable[tuple[Callable[[Sequence[str]], pl.DataFrame], Array]]
"""This rank's training rows in parts: what reads the named columns of a part, and its class indices, (rows,)."""

# Names that a line of the plan shows.
_NAMES_SHOWN = 20
# Rows that identifiers and codes are looked for in, and fewer than what tells anything.
_SAMPLE_ROWS, _FEWEST_ROWS = 1 << 12, 20
# Rows that show of nearly every column that it does not tell the class.
_ROWS_FIRST = 1 << 8
# Whole numbers of at most so many values may be codes.
_FEW_VALUES = 20
# A category tells its class where it has this many rows on average; a rare one does so by chance.
_ROWS_OF_A_CATEGORY = 5
_SPLIT_NAME = re.compile(r"((data|train|test)_?)?(split|fold|set|subset|partition)|is_?(train|test|valid)", re.I)
_ID_NAME = re.compile(r"(.*[_ .-])?(id|ids|key|uuid|guid|number|nr|no|num|index)|.*[a-z]I[dD]|ID", re.I)


def described_columns(spec: FeatureSpec, kinds: ColumnKinds | None, data: DataConfig) -> list[str]:
    """What each column became, in lines for the plan."""
    constant = [(c.name, "has one value or none in the training rows") for c in spec.numeric if c.scale == 0]
    ignored = {name for name, _ in constant}
    left_out = [*(kinds.left_out if kinds else ()), *constant, *((name, "data.drop") for name in data.drop)]
    lines = {
        "numbers": [column.name for column in spec.numeric if column.name not in ignored],
        "categories": [f"{column.name} ({_levels(column)})" for column in spec.categorical],
        "left out": [f"{name} ({why})" for name, why in left_out],
    }
    return [f"{what:10} {len(names):,}: {_listed(names)}" for what, names in lines.items() if names]


def _levels(column: CategoricalColumn) -> str:
    count = len(column.categories)
    if column.seen_in_training[UNKNOWN]:
        return f"the {count:,} most frequent levels"
    return f"{count:,} level{'s' * (count != 1)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def examine(pieces: Pieces, spec: FeatureSpec, padded: Mapping[str, str], collectives: Collectives) -> list[str]:
    """What looks wrong about the columns, a line each, on rank 0. `padded`: cells of digits that begin with a zero.

    Raises Stopped when the ranks have agreed to stop.
    """
    numeric, categorical = ([c.name for c in columns] for columns in (spec.numeric, spec.categorical))
    telling, sample = _telling(pieces, numeric, categorical, spec.num_classes, collectives)
    lines = [
        f"column {name!r} alone tells the class of every training row: is it a copy of the target, or known only "
        "after the fact? Then name it in data.drop"
        for name in telling
    ]
    lines += [
        f"column {name!r} is a feature, and it is named like a split: name it in data.split_column or in data.drop"
        for name in spec.names
        if _SPLIT_NAME.fullmatch(name)
    ]
    lines += _identifiers(sample, spec)
    lines += [
        f"column {name!r} holds {cell!r} and is read as numbers: if it holds codes, name it in data.categorical"
        for name, cell in padded.items()
    ]
    codes = _codes(sample, [name for name in numeric if name not in padded])
    if codes:
        lines.append(f"whole numbers of few values, read as quantities: {_listed(codes)}: codes go to data.categorical")
    return lines


def warn_of_columns(lines: Sequence[str], data: DataConfig) -> None:
    """Log lines of `examine`, and the words for "missing" that the configuration has taken away."""
    taken = [word for word in DataConfig().missing_values if word not in data.missing_values]
    if taken:
        words = ", ".join(map(repr, taken))
        log.warning("data.missing_values replaces the default words: %s no longer mean missing", words)
    for line in lines:
        log.warning("%s", line)


def _identifiers(sample: pl.DataFrame, spec: FeatureSpec) -> Iterator[str]:
    advice = "it looks like an identifier: name it in data.drop, unless the model should learn it by heart"
    present = frozenset(sample.columns)
    for column in spec.categorical:
        texts = arrow_text(sample[column.name].drop_nulls()) if column.name in present else None
        distinct = len(pyarrow.compute.unique(texts)) if texts else 0
        if texts and len(texts) >= _FEWEST_ROWS and distinct >= 0.9 * len(texts):
            yield f"column {column.name!r} has {distinct:,} distinct texts in {len(texts):,} rows: {advice}"
        elif column.seen_in_training[UNKNOWN]:
            yield (
                f"column {column.name!r} has more than {len(column.categories):,} categories: the most frequent are "
                "kept, the others are unknown to the model"
            )
    for name, values in _whole(sample, [column.name for column in spec.numeric]):
        distinct = len(np.unique(values))
        if len(values) < _FEWEST_ROWS or distinct < 0.9 * len(values):
            continue
        rising = bool((np.diff(values) > 0).all() or (np.diff(values) < 0).all())
        dense = distinct == len(values) and np.ptp(values) < 4 * len(values)
        if rising or dense or _ID_NAME.fullmatch(name):
            yield f"column {name!r} has {distinct:,} distinct whole numbers in {len(values):,} rows: {advice}"


def _codes(sample: pl.DataFrame, names: Sequence[str]) -> list[str]:
    found = []
    for name, values in _whole(sample, names):
        distinct = len(np.unique(values))
        if len(values) >= _FEWEST_ROWS and 2 < distinct <= min(_FEW_VALUES, len(values) // _ROWS_OF_A_CATEGORY):
            found.append(f"{name} ({distinct})")
    return found


def _whole(sample: pl.DataFrame, names: Sequence[str]) -> Iterator[tuple[str, Array]]:
    present = frozenset(sample.columns)
    for name in names:
        values = sample[name].to_numpy() if name in present else np.empty(0)
        values = values[~np.isnan(values)]
        if len(values) and (values == np.floor(values)).all():
            yield name, values


@dataclass
class _Seen:
    """What was seen of a column: the class of each category, or the smallest and largest number of each class.

    `None` stands for a missing cell among the categories; of numbers, `missing` are the classes with missing cells.
    """

    classes: dict[str | None, int] = field(default_factory=dict)
    ranges: dict[int, tuple[float, float]] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)

    def tells(self) -> bool:
        """Whether a number of the column has one class only."""
        between = sorted(self.ranges.values())
        apart = all(low[1] < high[0] for low, high in pairwise(between))
        return apart and len(self.missing) <= 1

    def merge(self, other: _Seen) -> bool:
        """Take over what another rank has seen; whether the column still tells the class."""
        agree = all(self.classes.setdefault(word, index) == index for word, index in other.classes.items())
        for index, (low, high) in other.ranges.items():
            former = self.ranges.get(index, (low, high))
            self.ranges[index] = min(low, former[0]), max(high, former[1])
        self.missing |= other.missing
        return agree and self.tells()


def _telling(
    pieces: Pieces, numeric: Sequence[str], categorical: Sequence[str], num_classes: int, collectives: Collectives
) -> tuple[list[str], pl.DataFrame]:
    """Columns that alone tell the class of each training row; and some rows of this rank, those of rank 0 on all."""
    seen = {name: _Seen() for name in (*numeric, *categorical)}
    texts = frozenset(categorical)
    state: dict[str, Any] = {"rows": 0, "sample": None}

    def look() -> Iterator[int]:
        for read, targets in pieces:
            frame = read(list(seen))
            state["rows"] += len(targets)
            if state["sample"] is None and len(targets):
                state["sample"] = frame.head(_SAMPLE_ROWS)
            for name in list(seen):
                column = frame[name]
                new = _of_texts(column, targets) if name in texts else _of_numbers(column, targets, num_classes)
                if new is None or not seen[name].merge(new):
                    del seen[name]
            yield len(targets)
            if not seen:
                return

    collectives.lockstep(look())
    merged: dict[str, _Seen] | None = None
    rows = 0
    for of_rank, num_rows in collectives.all_gather_object(lambda: (seen, state["rows"])):
        rows += num_rows
        merged = of_rank if merged is None else {
            name: known for name, known in merged.items() if name in of_rank and known.merge(of_rank[name])
        }  # fmt: skip
    found = [
        name
        for name, known in (merged or {}).items()
        if rows >= _FEWEST_ROWS and len(known.classes) * _ROWS_OF_A_CATEGORY <= rows
    ]
    sample = state["sample"]
    return found, pl.DataFrame() if sample is None else sample


def _of_texts(column: pl.Series, targets: Array) -> _Seen | None:
    """The class of each category; None where one has several."""
    coded = arrow_text(column).dictionary_encode(null_encoding="encode")
    places, words = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    classes = np.full(len(words), -1, dtype=np.int64)
    classes[places] = targets
    return _Seen(dict(zip(words, classes.tolist(), strict=True))) if (classes[places] == targets).all() else None


def _of_numbers(column: pl.Series, targets: Array, num_classes: int) -> _Seen | None:
    """The range of each class; None where two overlap."""
    if len(column) > _ROWS_FIRST and _of_numbers(column[:_ROWS_FIRST], targets[:_ROWS_FIRST], num_classes) is None:
        return None
    values, found = column.to_numpy(), _Seen()
    holes = np.isnan(values)
    if holes.any():
        found.missing = set(np.unique(targets[holes]).tolist())
        values, targets = values[~holes], targets[~holes]
    if not len(values):
        return found
    order = np.argsort(values, kind="stable")
    changes = np.flatnonzero(np.diff(targets[order]))
    if len(changes) >= num_classes:
        return None
    for part in np.split(order, changes + 1):
        index = int(targets[part[0]])
        if index in found.ranges:
            return None
        found.ranges[index] = float(values[part[0]]), float(values[part[-1]])
    return found if found.tells() else None
