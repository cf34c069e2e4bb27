"""Chunks of a file are scored on all ranks and threads, round by round, with the bits of one rank and one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import polars as pl
import torch
from torch import Tensor

from dist_train.data.encoding.unfamiliar import Unfamiliar
from dist_train.data.tables.chunks import Chunk
from dist_train.distributed.collectives import Collectives

Score = Callable[[Chunk], tuple[Tensor, Unfamiliar]]
"""A chunk -> probabilities and numbers of its reasons, (rows, width) float64 on the CPU; its unfamiliar cells."""


@dataclass(frozen=True)
class Scored:
    """Rows in the order of their file. `kept`: the columns that are carried over; `reasons`: as of `Explanation`."""

    kept: pl.DataFrame
    probabilities: Tensor
    unfamiliar: Unfamiliar
    reasons: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.probabilities)


def scored_in_rounds(
    chunks: Iterator[Chunk], score: Score, num_classes: int, collectives: Collectives, num_others: int = 0
) -> Iterator[Scored | None]:
    """The scores of each round on rank 0; None on the other ranks. Called by all ranks, of which each has all chunks.

    `score` gives `num_classes` probabilities of a row, and `num_others` numbers of its reasons beside them.

    A round is a chunk for each thread of each rank, in rank order. While one is scored, the next is read. Each thread
    computes by itself, so that a chunk has the same bits whichever computes it. What is wrong in a file is raised in
    the order of its rows.
    """
    former = torch.get_num_threads()
    threads = max(collectives.all_gather_object(lambda: 1 if collectives.device.type == "cuda" else former))
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending: _Round | None = None
        while pending is None or pending.goes_on:
            following = _Round.read(chunks, score, pool, threads, collectives)
            if pending is not None:
                yield pending.collected(num_classes, num_others, collectives)
            pending = following
        if pending.chunks or pending.failure:
            yield pending.collected(num_classes, num_others, collectives)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(former)


@dataclass
class _Round:
    """Chunks that are being scored: those of this rank, and on rank 0 the kept columns of all.

    `chunks` counts those of all ranks; `goes_on`: more may follow; `failure`: why the next one could not be read.
    """

    scores: list[Future[tuple[Tensor, Unfamiliar]]] = field(default_factory=list)
    kept: list[pl.DataFrame] = field(default_factory=list)
    chunks: int = 0
    goes_on: bool = True
    failure: Exception | None = None

    @classmethod
    def read(
        cls, chunks: Iterator[Chunk], score: Score, pool: ThreadPoolExecutor, threads: int, collectives: Collectives
    ) -> _Round:
        """Read a chunk for each thread of all ranks, and begin to score this rank's."""
        found = cls()
        for number in range(threads * collectives.size):
            try:
                chunk = next(chunks, None)
            except Exception as error:
                found.failure = error
                chunk = None
            if chunk is None:
                found.goes_on = False
                break
            found.chunks += 1
            if collectives.is_main:
                found.kept.append(chunk.kept)
            if number // threads == collectives.rank:
                found.scores.append(pool.submit(score, chunk))
        return found

    def collected(self, num_classes: int, num_others: int, collectives: Collectives) -> Scored | None:
        """The scores of all ranks once they are there, on rank 0."""
        own = [torch.empty((0, num_classes + num_others), dtype=torch.float64)]

        def finish() -> Unfamiliar:
            unfamiliar = Unfamiliar()
            for future in self.scores:
                numbers, cells = future.result()
                own.append(numbers)
                unfamiliar += cells
            return unfamiliar

        def tell() -> None:
            if self.failure is not None:
                raise self.failure

        of_ranks = collectives.all_gather_object(finish)
        collectives.all_gather_object(tell)
        numbers = collectives.gather_rows(torch.cat(own))
        if numbers is None:
            return None
        return Scored(
            pl.concat(self.kept),
            numbers[:, :num_classes],
            sum(of_ranks, Unfamiliar()),
            numbers[:, num_classes:] if num_others else None,
        )
