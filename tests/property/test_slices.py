"""Slices of the exact mode: the same for every world size, and so is what is folded over them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data.sampler import MicroBatchIndices, PositionSampler
from dist_train.determinism.position import Position
from dist_train.determinism.slices import split_slices
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World


class Gathered(Collectives):
    """A rank's collectives when it is known what every rank brings."""

    def __init__(self, partials: list[torch.Tensor]) -> None:
        super().__init__(World())
        self.size = len(partials)
        self._partials = partials

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        assert any(torch.equal(tensor, partial) for partial in self._partials)
        return torch.stack(self._partials)


def partial_sums(share: MicroBatchIndices, values: torch.Tensor) -> torch.Tensor:
    """What a rank brings of a share: the sum over each of its slices."""
    return torch.stack([part.sum(0) for part in split_slices(values[share.rows], share.slices)])


@settings(deadline=None, max_examples=120)
@given(
    num_rows=st.integers(2, 400),
    batch_size=st.integers(2, 90),
    virtual_ranks=st.integers(1, 24),
    passes=st.integers(1, 4),
    steps=st.integers(0, 30),
    seed=st.integers(0, 2**32),
)
def test_slices_and_folds_are_the_same_for_every_world_size(
    num_rows: int, batch_size: int, virtual_ranks: int, passes: int, steps: int, seed: int
) -> None:
    # Values of very different size: any other order of addition shows.
    values = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (torch.arange(3) * 4)
    seen: list[tuple[list[list[int]], list[torch.Tensor]]] = []
    for world in (w for w in range(1, virtual_ranks + 1) if virtual_ranks % w == 0):
        samplers = [
            PositionSampler(
                num_rows, rank=rank, world_size=world, seed=seed, global_batch_size=batch_size,
                accumulation_steps=passes, num_slices=virtual_ranks,
            )
            for rank in range(world)
        ]  # fmt: skip
        position = Position()
        for _ in range(steps):
            position = samplers[0].step_end(position)
        shares = [sampler.shares(position) for sampler in samplers]
        rows, folds = [], []
        for of_pass in zip(*shares, strict=True):
            rows += [part.tolist() for share in of_pass for part in share.rows.split(share.slices)]
            partials = [partial_sums(share, values) for share in of_pass]
            folded = [Gathered(partials).ordered_sum(partial) for partial in partials]
            assert all(torch.equal(f, folded[0]) for f in folded)
            folds.append(folded[0])
        seen.append((rows, folds))
    first_rows, first_folds = seen[0]
    lengths = [len(r) for r in first_rows]
    assert len(lengths) % virtual_ranks == 0
    assert max(lengths[:virtual_ranks]) - min(lengths[:virtual_ranks]) <= 1
    for other_rows, other_folds in seen[1:]:
        assert other_rows == first_rows
        assert all(torch.equal(a, b) for a, b in zip(other_folds, first_folds, strict=True))
