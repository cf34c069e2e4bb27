"""Parts of a table in the order of time: the latest rows first. Rows of one time are never cut apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_train.data.quantiles import order_statistics
from dist_train.distributed.collectives import Collectives

_SIGN_BIT = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class TimeSplit:
    """Part i holds the rows from time `starts[i]` on that are in no earlier part, the last part all other rows.

    `starts` do not rise, (parts - 1,) int64.
    """

    starts: Tensor

    @classmethod
    def fit(
        cls,
        pieces: Callable[[], Iterable[Tensor]],
        collectives: Collectives,
        *,
        borders: Callable[[int], list[int]],
    ) -> TimeSplit:
        """`pieces` gives the times of this rank's rows, int64 tensors, as often as it is asked.

        Each border is put between two times, where it leaves the number of rows that is nearest to the wish. `borders`
        are those of `Parts`.
        """
        wishes = torch.zeros(len(borders(0)), dtype=torch.int64)

        def keys() -> Iterator[list[tuple[Tensor, Tensor | int]]]:
            for times in pieces():
                yield [(times ^ _SIGN_BIT, 0)]

        def places(totals: Tensor) -> Tensor:
            count = int(totals[0])
            wishes.copy_(torch.tensor(borders(count)))
            return (count - wishes).clamp(0, max(0, count - 1)).unsqueeze(0)

        with_ties = order_statistics(keys, 1, places, collectives)[0] ^ _SIGN_BIT
        candidates = torch.stack([with_ties + 1, with_ties])
        counts = torch.zeros_like(candidates)

        def count() -> Iterator[int]:
            for times in pieces():
                ordered = times.sort().values
                # As many rows are at or after a time as there are rows without those before it.
                counts.add_(len(ordered) - torch.searchsorted(ordered, candidates))
                yield len(times)

        collectives.lockstep(count())
        nearest = (collectives.all_reduce(counts) - wishes).abs().argmin(0)
        return cls(candidates.gather(0, nearest.unsqueeze(0))[0])

    def parts(self, times: Tensor) -> Tensor:
        """Part of each row by its time, int64."""
        return (times.unsqueeze(1) < self.starts).sum(1)

    def pack(self) -> dict[str, Any]:
        """As JSON types; `unpack` reads it."""
        return {"starts": self.starts.tolist()}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> TimeSplit:
        """What `pack` packed."""
        return cls(torch.tensor(packed["starts"], dtype=torch.int64))
