"""Scale on paper: step time and efficiency of 1 to 1024 ranks from measured compute and the costs of messages.

The model is docs/scaling.md; every number that is assumed and not measured stands in its table. A message of S bytes
over a link takes latency + S / bandwidth; collectives are made of messages as below. Nothing overlaps: a step is its
compute and then its collectives. Ranks that share cores take turns on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between two ranks: seconds before the first byte, and bytes per second in one direction."""

    latency: float
    bandwidth: float

    def message(self, size: float) -> float:
        """Seconds of a message of `size` bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of `ranks_per_node` ranks. `start` is the seconds that each collective takes besides its messages.

    `trees`: whether the library has tree algorithms beside rings (NCCL has, for all-reduce). `own_batch_norm`: whether
    the fast mode's BatchNorm is torch's, which sums in its backward pass where this project's gathers. `cores` is how
    many cores the ranks of a node share, None when each rank has a processor of its own.
    """

    inner: Link
    outer: Link
    ranks_per_node: int
    start: float = 0.0
    trees: bool = True
    own_batch_norm: bool = True
    cores: int | None = None

    def sharing(self, ranks: int) -> float:
        """By how much ranks slow each other down because they share cores."""
        return max(1.0, min(ranks, self.ranks_per_node) / self.cores) if self.cores else 1.0

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds to sum `size` bytes over the ranks: within each node, then one part per rank between the nodes."""
        if ranks == 1:
            return 0.0
        local = min(ranks, self.ranks_per_node)
        nodes = math.ceil(ranks / local)
        seconds = self._reduce(size, local, self.inner) + self._reduce(size / local, nodes, self.outer)
        return (self.start + seconds) * self.sharing(ranks)

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until every rank has the `size` bytes of every rank: a ring, as slow as its slowest link."""
        if ranks == 1:
            return 0.0
        link = self.inner if ranks <= self.ranks_per_node else self.outer
        return (self.start + (ranks - 1) * link.message(size)) * self.sharing(ranks)

    def _reduce(self, size: float, ranks: int, link: Link) -> float:
        ring = 2 * (ranks - 1) * link.message(size / ranks)
        # Down and up a tree in a pipeline of small pieces: each link carries all bytes twice.
        tree = 2 * math.ceil(math.log2(ranks)) * link.latency + 2 * size / link.bandwidth
        return min(ring, tree) if self.trees and ranks > 1 else ring


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Seconds of a step on one rank without communication: measured (rows, seconds) pairs, ascending.

    The exact mode adds `exact_fixed` seconds to a step, `per_slice` for each slice that a rank computes, and
    `fold_slice` for each slice of all ranks, whose gradients every rank adds up.
    """

    points: Sequence[tuple[float, float]]
    exact_fixed: float = 0.0
    per_slice: float = 0.0
    fold_slice: float = 0.0

    def fast(self, rows: float) -> float:
        """Straight lines between the points; below the first no less than that, beyond the last in proportion."""
        if rows <= self.points[0][0]:
            return self.points[0][1]
        for (low, before), (high, after) in zip(self.points, self.points[1:], strict=False):
            if rows <= high:
                return before + (after - before) * (rows - low) / (high - low)
        high, after = self.points[-1]
        return after * rows / high

    def exact(self, rows: float, own_slices: float, slices: int) -> float:
        """A step of `own_slices` slices of this rank, with the gradients of all `slices` added up."""
        return self.fast(rows) + self.exact_fixed + own_slices * self.per_slice + slices * self.fold_slice


@dataclass(frozen=True, kw_only=True)
class Messages:
    """Bytes that a rank puts into the collectives of a step, for each slice: in the fast mode a rank is one slice."""

    gradients: int
    batch_norm_forward: int
    batch_norm_backward: int
    votes: int


def messages(parameters: int, width: int) -> Messages:
    """Float32 gradients; (count, mean, variance) of a BatchNorm in float64; two float32 sums; loss, weight, vote."""
    return Messages(
        gradients=4 * parameters, batch_norm_forward=3 * 8 * width, batch_norm_backward=2 * 4 * width, votes=3 * 8
    )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one step: seconds of compute and of collectives; efficiency against one rank without any of them."""

    ranks: int
    compute: float
    collectives: float
    efficiency: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.collectives


def predict(
    compute: Compute, cluster: Cluster, sent: Messages, *, ranks: int, batch_size: int, virtual_ranks: int | None
) -> Prediction:
    """A step of `batch_size` rows over all ranks; `virtual_ranks` None is the fast mode, else V, a multiple of ranks.

    ValueError when it is not.
    """
    if virtual_ranks is not None and virtual_ranks % ranks:
        raise ValueError(f"{ranks} ranks do not divide V = {virtual_ranks}")
    rows = batch_size / ranks
    own_slices = 1 if virtual_ranks is None else virtual_ranks // ranks
    gathered = [sent.batch_norm_forward, sent.batch_norm_backward]
    summed = []
    if virtual_ranks is None:
        alone, busy = compute.fast(batch_size), compute.fast(rows)
        summed += [sent.gradients, sent.votes]
        if cluster.own_batch_norm:
            gathered.remove(sent.batch_norm_backward)
            summed.append(sent.batch_norm_backward)
    else:
        alone = compute.exact(batch_size, virtual_ranks, virtual_ranks)
        busy = compute.exact(rows, own_slices, virtual_ranks)
        gathered += [sent.gradients, sent.votes]
    collectives = sum(cluster.all_gather(own_slices * size, ranks) for size in gathered)
    collectives += sum(cluster.all_reduce(size, ranks) for size in summed)
    busy *= cluster.sharing(ranks)
    return Prediction(
        ranks=ranks, compute=busy, collectives=collectives, efficiency=alone / (ranks * (busy + collectives))
    )


def fitted_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The link whose message times are closest to the measured ones, each weighed by its own size: least squares.

    The relative error counts, so that small messages have as much say as large ones.
    """
    weights = [1 / s for s in seconds]
    # Normal equations of w (a + b x) = w y.
    saa = sum(w * w for w in weights)
    sab = sum(w * w * x for w, x in zip(weights, sizes, strict=True))
    sbb = sum(w * w * x * x for w, x in zip(weights, sizes, strict=True))
    say = sum(w * w * y for w, y in zip(weights, seconds, strict=True))
    sby = sum(w * w * x * y for w, x, y in zip(weights, sizes, seconds, strict=True))
    determinant = saa * sbb - sab * sab
    latency = (say * sbb - sby * sab) / determinant
    per_byte = (saa * sby - sab * say) / determinant
    return Link(latency=max(latency, 1e-9), bandwidth=1 / max(per_byte, 1e-15))
