"""Score all rows of a prepared table."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from dist_train import __version__
from dist_train.data.encoding.unfamiliar import Unfamiliar
from dist_train.data.splits.split import SPLITS
from dist_train.errors import TrainingFault, UserError
from dist_train.run.scoring.partial_scores import PartialScores, require_writable
from dist_train.run.scoring.predictor import Predictor
from dist_train.run.scoring.score_file import scores_of

_ROWS_AT_ONCE = 1 << 16


def score_store(predictor: Predictor, store: Path, output: Path) -> int | None:
    """Write `row`, `probability_<class>` for each class and `predicted_class` for each row that a store holds.

    `row` is the number of the row in the table that was prepared, counted from 0; rows without a split are not in a
    store. The number of rows, on rank 0; None on other ranks. Called by all ranks. The output has the same bytes for
    every number of ranks. The probabilities of all rows are held in memory.

    Raises:
        UserError: the store cannot be read or is one of other columns than the model's, or the output cannot be
            written.
    """
    collectives = predictor.collectives
    inputs = {"the store": store, "the data of the run": Path(predictor.config.data.path)}
    collectives.on_rank_zero(lambda: require_writable(output, inputs))
    numbers: list[Tensor] = []
    parts: list[Tensor] = []
    for split in SPLITS:
        found = predictor.scored_split(split, store)
        if found is not None and found[0] is not None:
            parts.append(found[0])
            numbers.append(found[1].row_numbers)

    def write() -> int:
        rows, order = torch.cat(numbers).sort()
        probabilities = predictor.shipped(torch.cat(parts))[order]
        identity = {"store": str(store.resolve()), "model": predictor.fingerprint, "dist_train": __version__}
        partial = PartialScores(output, identity, _ROWS_AT_ONCE)
        try:
            for start in range(partial.rows, len(rows), _ROWS_AT_ONCE):
                chosen = slice(start, start + _ROWS_AT_ONCE)
                frame = scores_of(probabilities[chosen], predictor.class_names)
                partial.append(frame.insert_column(0, pl.Series("row", rows[chosen].numpy())), Unfamiliar())
            partial.finish()
        except (UserError, TrainingFault):
            partial.discard()
            raise
        return len(rows)

    written: int = collectives.on_rank_zero(write)
    return written if collectives.is_main else None
