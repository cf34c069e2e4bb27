"""Exact evaluation: every row counted once, in passes that are cut alike for every world size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives
from dist_train.errors import TrainingFault
from dist_train.training.protocols import Collective, Ragged, Rows, Scorer

# A vote on whether to stop is a collective; a pass may be shorter than that.
PASSES_BETWEEN_VOTES = 16
# Of rows that have lengths a pass takes much longer: the ranks that have computed theirs wait for the others.
ROWS_OF_LENGTHS = {"cpu": 32, "cuda": 512}


@torch.no_grad()
def probabilities(
    model: nn.Module, rows: Rows, batch_size: int, scorer: Scorer, collectives: Collectives
) -> Tensor | None:
    """Class probabilities of all rows on rank 0, (rows, classes) float64 on the CPU; None on the other ranks.

    The rows are cut in passes of `batch_size`, and the ranks take contiguous runs of passes: a pass is the same
    arithmetic on whichever rank it is computed. A pass of rows that have lengths has rows of similar ones, and
    ROWS_OF_LENGTHS at most, or the model's `rows_at_once`. Raises Stopped when the ranks have agreed to stop.
    """
    was_training = model.training
    model.eval()
    inputs, order = rows.slice, None
    if isinstance(rows, Ragged):
        most = getattr(model, "rows_at_once", ROWS_OF_LENGTHS[collectives.device.type])
        batch_size = min(batch_size, most)
        order = by_length(rows.lengths, batch_size, collectives.size)
        inputs = partial(_chosen, rows, order)
    num_passes = -(-len(rows) // batch_size)
    first, last = split_evenly(0, num_passes, collectives.size)[collectives.rank]
    ends = [min(len(rows), number * batch_size) for number in range(first, last + 1)]
    # One tensor for all passes: small ones that stay, made between large ones that are freed, fragment the heap.
    num_classes = len(scorer.class_names)
    own = torch.empty((ends[-1] - ends[0], num_classes), dtype=torch.float64, device=collectives.device)
    for number in range(-(-num_passes // collectives.size)):  # the same for every rank; one may have a pass less
        if number % PASSES_BETWEEN_VOTES == 0:
            collectives.raise_if_stop_agreed()
        if first + number < last or isinstance(model, Collective):
            start, stop = ends[min(number, last - first)], ends[min(number + 1, last - first)]
            with scorer.arithmetic.of_torch():
                own[start - ends[0] : stop - ends[0]] = scorer.probabilities(model(*inputs(start, stop)))
    model.train(was_training)
    gathered = collectives.gather_rows(own)
    if gathered is None or order is None:
        return gathered
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


def by_length(lengths: Tensor, batch_size: int, ranks: int) -> Tensor:
    """An order of the rows, (rows,): those of a pass have similar lengths, and each rank has short and long passes."""
    order = lengths.argsort(stable=True)
    whole = len(order) // batch_size * batch_size
    passes = order[:whole].split(batch_size)
    return torch.cat([*(each for rank in range(ranks) for each in passes[rank::ranks]), order[whole:]])


def _chosen(rows: Ragged, order: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
    return rows.inputs(order[start:stop])


def evaluate(
    model: nn.Module, rows: Rows, scorer: Scorer, batch_size: int, collectives: Collectives
) -> dict[str, Any] | None:
    """Metrics of the model on all rows, the same on every rank; None when there are no rows.

    TrainingFault on every rank when probabilities are not finite.
    """
    if len(rows) == 0:
        return None
    with collectives.heartbeat.phase("evaluation"):
        return scores(probabilities(model, rows, batch_size, scorer, collectives), rows, scorer, collectives)


def scores(predicted: Tensor | None, rows: Rows, scorer: Scorer, collectives: Collectives) -> dict[str, Any]:
    """Metrics of the probabilities that rank 0 has, (rows, classes), the same on every rank.

    TrainingFault on every rank when they are not finite.
    """

    def score() -> dict[str, Any]:
        assert predicted is not None  # on rank 0
        lost = int((~predicted.isfinite().all(1)).sum())
        if lost:
            raise TrainingFault(
                f"the model's probabilities are not finite for {lost} of {len(rows)} rows: its weights are too large "
                "or not finite; lower optim.lr or set optim.max_grad_norm"
            )
        weights = () if rows.weights is None else (rows.weights.cpu(),)  # a task need not take any
        return scorer.metrics(predicted, rows.targets.cpu(), *weights)

    return collectives.on_rank_zero(score)
