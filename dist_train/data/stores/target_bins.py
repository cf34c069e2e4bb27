"""Bins of numeric columns by the target: the leaves of a decision tree of each column (Gorishniy, Rubachev and Babenko
2022, "On embeddings for numerical features", section 3.2.2).

The tree sees, of the training rows of all ranks, how many of each class lie between neighbouring quantiles of the spec:
whole numbers, which are the same for every world size. So its thresholds are quantiles: some of 257 where
`data.numeric_transform` is quantile, of 33 where it is robust. Rows count alike, whatever `data.weight` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.data.encoding.spec import FeatureSpec, NumericColumn
from dist_train.data.splits.split import SPLITS
from dist_train.data.stores.prepare import TableSplit
from dist_train.data.stores.spool import Spool
from dist_train.data.tables.table import numbers
from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives

SMALLEST_LEAF = 64
"""Training rows of a bin, at least, where there are several bins."""


def with_target_edges(
    spec: FeatureSpec, spool: Spool, split: TableSplit, num_bins: int, collectives: Collectives, *, source: str
) -> FeatureSpec:
    """The spec with `target_edges` of each numeric column: `num_bins` bins at most. Each rank counts its share.

    Raises:
        Stopped: the ranks have agreed to stop.
    """
    columns = [column for column in spec.numeric if column.scale and column.quantiles]
    if not columns:
        return spec
    cells = {column.name: torch.tensor(column.quantiles, dtype=torch.float64).unique() for column in columns}
    counts = _counts_of_cells(spec, spool, split, cells, collectives, source)
    edges = collectives.on_rank_zero(lambda: {name: _edges(cells[name], counts[name], num_bins) for name in cells})
    return replace(spec, numeric=tuple(_with_edges(column, edges.get(column.name, ())) for column in spec.numeric))


def _with_edges(column: NumericColumn, edges: tuple[float, ...]) -> NumericColumn:
    return replace(column, target_edges=edges)


def _counts_of_cells(
    spec: FeatureSpec,
    spool: Spool,
    split: TableSplit,
    cells: dict[str, Tensor],
    collectives: Collectives,
    source: str,
) -> dict[str, Tensor]:
    """Training rows of all ranks in each cell by class, (cells - 1, classes); missing ones are not counted."""
    counts = {name: torch.zeros((len(ends) - 1, spec.num_classes), dtype=torch.int64) for name, ends in cells.items()}
    begin, end = split_evenly(0, len(spool.chunks), collectives.size)[collectives.rank]

    def count() -> Iterator[int]:
        for chunk in spool.chunks[begin:end]:
            training = split.codes(spool, chunk) == SPLITS.index("train")
            frame, targets = spool.frame(chunk, list(cells), spec.readings), spool.targets(chunk)
            for name, ends in cells.items():
                values = numbers(frame[name], source, chunk.first_row)
                counted = training & ~values.isnan()
                # A value at the end of a cell is in it, and the smallest one is in the first.
                cell = torch.searchsorted(ends, values[counted]).clamp(1, len(ends) - 1) - 1
                index = cell * spec.num_classes + targets[counted]
                counts[name].view(-1).add_(torch.bincount(index, minlength=counts[name].numel()))
            yield chunk.num_rows

    collectives.lockstep(count())
    return {name: collectives.all_reduce(of_column) for name, of_column in counts.items()}


def _edges(ends: Tensor, counts: Tensor, num_bins: int) -> tuple[float, ...]:
    """Ends of the cells that a tree with `num_bins` leaves splits at, the outermost ones included."""
    total = int(counts.sum())
    if num_bins == 1 or total < 2 * SMALLEST_LEAF:
        return float(ends[0]), float(ends[-1])
    # Imported here: a model without such bins must not wait for scikit-learn.
    from sklearn.tree import DecisionTreeClassifier

    filled, classes = counts.numpy().nonzero()
    tree: Any = DecisionTreeClassifier(
        max_leaf_nodes=num_bins, min_weight_fraction_leaf=SMALLEST_LEAF / total, random_state=0
    )
    tree.fit(filled[:, None], classes, sample_weight=counts.numpy()[filled, classes])
    thresholds = tree.tree_.threshold[tree.tree_.children_left >= 0]
    last_cells = np.unique(np.floor(thresholds).astype(np.int64))
    return tuple(ends[[0, *(last_cells + 1).tolist(), len(ends) - 1]].tolist())
