"""Which rows a rank trains on at which step: every row once per epoch, at any world size, from any position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DistributedSampler

from dist_train.data.order import BalancedOrder, BlockOrder, FullOrder, Order, SortedOrder
from dist_train.determinism.position import Position, split_evenly
from dist_train.errors import UserError


@dataclass(frozen=True)
class MicroBatchIndices:
    """This rank's rows of one forward-backward pass.

    `rows` are row numbers, (n,), n may be 0; `slices` the lengths of the contiguous slices that they consist of;
    `first_row` is the place of the first row in the epoch's order; `global_rows` counts the pass's rows of all ranks.
    """

    rows: Tensor
    slices: tuple[int, ...]
    epoch: int
    first_row: int
    global_rows: int


def steps_of_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps of an epoch. A last batch of a single row joins the one before it: one row has no variance."""
    return max(1, -(-num_rows // batch_size) - (num_rows % batch_size == 1))


class PositionSampler(DistributedSampler[int]):
    """A DistributedSampler whose state is a position, so that it needs no `set_epoch` and resumes anywhere at once.

    The order of an epoch is a function of (seed, epoch): FullOrder, BlockOrder where `shuffle_block_rows` is set, or
    BalancedOrder where `classes` is given, the class index of each row, or SortedOrder over `sort_batches` global
    batches where `lengths` is given, the length of each row. `epochs_ahead`: as FullOrder's `ahead`.
    Each global batch is the next `global_batch_size` rows of that order, cut into `accumulation_steps` passes, each of
    them cut into `num_slices` contiguous slices, of which each rank owns a contiguous run. Nothing is padded and
    nothing dropped: slices differ by one row at most and may be empty. Where `padded_lengths` is given, (num_rows,)
    int64, a batch is cut into more passes until none has more than `tokens_per_pass` tokens, its rows padded to the
    longest, or has only two or three rows.

    As an iterable (for a torch DataLoader) it yields this rank's row numbers from `position` to the end of the epoch,
    and the next iteration is the next epoch.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        global_batch_size: int,
        accumulation_steps: int = 1,
        num_slices: int | None = None,
        shuffle_block_rows: int | None = None,
        classes: Tensor | None = None,
        lengths: Tensor | None = None,
        sort_batches: int = 1,
        padded_lengths: Tensor | None = None,
        tokens_per_pass: int | None = None,
        epochs_ahead: int = 0,
        position: Position = Position(),  # noqa: B008  (immutable)
    ) -> None:
        if num_rows < 2:
            raise UserError(f"{num_rows} training rows: at least 2 are needed")
        # The base asks its dataset for nothing but a length.
        super().__init__(cast(Any, range(num_rows)), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.num_rows = num_rows
        self.global_batch_size = global_batch_size
        self.accumulation_steps = accumulation_steps
        self.slices_of_a_rank = (num_slices or world_size) // world_size
        self.position = position
        self._padded_lengths = padded_lengths
        self._tokens_per_pass = tokens_per_pass
        self._order: Order
        if classes is not None:
            self._order = BalancedOrder(classes, seed)
        elif shuffle_block_rows:
            self._order = BlockOrder(num_rows, shuffle_block_rows, seed)
        elif lengths is not None:
            window_rows = sort_batches * global_batch_size
            self._order = SortedOrder(lengths, seed, batch_rows=global_batch_size, window_rows=window_rows)
        else:
            self._order = FullOrder(num_rows, seed, epochs_ahead)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps from the start to the end of an epoch."""
        return steps_of_epoch(self.num_rows, self.global_batch_size)

    def order(self, epoch: int) -> Tensor:
        """Row numbers in the order in which the epoch trains them, (num_rows,)."""
        return self._order.rows(epoch, 0, self.num_rows)

    def step_end(self, position: Position) -> Position:
        """Position after the optimizer step that starts at `position`; the end of an epoch is the next one's start."""
        stop = position.rows + self.global_batch_size
        if stop + 1 >= self.num_rows:
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, stop)

    def shares(self, position: Position, rank: int | None = None) -> list[MicroBatchIndices]:
        """A rank's part of the optimizer step that starts at `position`, one share for each pass; None: this rank's."""
        first_slice = (self.rank if rank is None else rank) * self.slices_of_a_rank
        slices = range(first_slice, first_slice + self.slices_of_a_rank)
        stop = position.rows + self.global_batch_size
        if stop + 1 >= self.num_rows:
            stop = self.num_rows
        shares = []
        for first, last in self._passes(position, stop):
            own = split_evenly(first, last, self.num_replicas * self.slices_of_a_rank, slices)
            begin, end = own[0][0], own[-1][1]
            lengths = tuple([stop - start for start, stop in own])
            rows = self._order.rows(position.epoch, begin, end)
            shares.append(MicroBatchIndices(rows, lengths, position.epoch, begin, last - first))
        return shares

    def _passes(self, position: Position, stop: int) -> list[tuple[int, int]]:
        """Places of the epoch's order where each pass of a global batch begins and ends, the same on every rank."""
        # A pass needs two rows for its batch statistics: a small last batch takes fewer passes.
        most = max(1, (stop - position.rows) // 2)
        fewest = min(self.accumulation_steps, most)
        if self._padded_lengths is None or self._tokens_per_pass is None:
            return split_evenly(position.rows, stop, fewest)
        widths = self._padded_lengths[self._order.rows(position.epoch, position.rows, stop)]
        fewest = max(fewest, -(-int(widths.sum()) // self._tokens_per_pass))
        for passes in range(fewest, most):
            cut = split_evenly(0, len(widths), passes)
            if all(int(widths[a:b].max()) * (b - a) <= self._tokens_per_pass for a, b in cut):
                return split_evenly(position.rows, stop, passes)
        return split_evenly(position.rows, stop, most)

    def set_epoch(self, epoch: int) -> None:
        """Start the given epoch from its first row. Never needed: epochs follow each other by themselves."""
        self.position = Position(epoch, 0)

    def __iter__(self) -> Iterator[int]:
        epoch = self.position.epoch
        while self.position.epoch == epoch:
            shares = self.shares(self.position)
            self.position = self.step_end(self.position)
            for share in shares:
                yield from share.rows.tolist()

    def __len__(self) -> int:
        """Rows of this rank from the current position to the end of the epoch."""
        count, position = 0, self.position
        while position.epoch == self.position.epoch:
            count += sum(len(share.rows) for share in self.shares(position))
            position = self.step_end(position)
        return count
