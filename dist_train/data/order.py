"""In which order an epoch trains its rows: a function of (seed, epoch). Every row once, or classes in equal shares."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from dist_train.determinism.keyed_random import permutation

# Blocks whose rows are mixed with each other. A batch is drawn from so many places of the table.
WINDOW_BLOCKS = 64
# That make the orders of epochs in advance.
MOST_THREADS = 4


class Order(Protocol):
    """The order of every epoch."""

    def rows(self, epoch: int, begin: int, end: int) -> Tensor:
        """Row numbers of the places `begin` to `end` of an epoch's order, (end - begin,) int64."""


class FullOrder:
    """Any order of the rows is as likely as any other. Holds 8 bytes a row of an epoch.

    The orders of the next `ahead` epochs are made in threads meanwhile: on a GPU an epoch may take no longer than its
    order does.
    """

    def __init__(self, num_rows: int, seed: int, ahead: int = 0) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self._kept: tuple[int, Tensor] | None = None
        self._ahead = ahead
        self._threads = ThreadPoolExecutor(min(ahead, MOST_THREADS), "order of an epoch") if ahead else None
        self._coming: dict[int, Future[Tensor]] = {}

    def rows(self, epoch: int, begin: int, end: int) -> Tensor:
        """Row numbers of the places `begin` to `end` of an epoch's order."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = None  # the former epoch's goes before the next one's comes
            coming = self._coming.pop(epoch, None)
            self._kept = epoch, self._order(epoch) if coming is None else coming.result()
            self._look_ahead(epoch)
        return self._kept[1][begin:end]

    def _order(self, epoch: int) -> Tensor:
        return permutation(self._num_rows, "order", self._seed, epoch)

    def _look_ahead(self, epoch: int) -> None:
        wanted = range(epoch + 1, epoch + 1 + self._ahead)
        self._coming = {one: order for one, order in self._coming.items() if one in wanted}
        if self._threads is not None:
            for one in wanted:
                if one not in self._coming:
                    self._coming[one] = self._threads.submit(self._order, one)


class BalancedOrder:
    """As many draws as rows, in which every class that occurs has the same share, to one draw.

    Of a class, each row is drawn as often as its share holds the class, and a random subset of its rows once more. So
    the expected number of draws of a row is exactly rows / (classes * rows of its class). `classes` are the class
    indices of all rows, (rows,). Holds 16 bytes a row.
    """

    def __init__(self, classes: Tensor, seed: int) -> None:
        self._members = [(classes == index).nonzero().squeeze(1) for index in classes.unique().tolist()]
        self._num_rows = len(classes)
        self._seed = seed
        self._kept: tuple[int, Tensor] | None = None

    def rows(self, epoch: int, begin: int, end: int) -> Tensor:
        """Row numbers of the places `begin` to `end` of an epoch's order."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = None
            self._kept = epoch, self._drawn(epoch)
        return self._kept[1][begin:end]

    def _drawn(self, epoch: int) -> Tensor:
        share, rest = divmod(self._num_rows, len(self._members))
        # The draws that are left over go to classes in turn by chance: the expected share of each is the same.
        favoured = set(permutation(len(self._members), "classes with a draw more", self._seed, epoch)[:rest].tolist())
        drawn = []
        for index, members in enumerate(self._members):
            times, once_more = divmod(share + (index in favoured), len(members))
            order = permutation(len(members), "rows of a class", self._seed, epoch, index)
            drawn += [members] * times + [members[order[:once_more]]]
        return torch.cat(drawn)[permutation(self._num_rows, "order", self._seed, epoch)]


class SortedOrder:
    """Batches of rows of similar length, so that little is padded.

    The rows come in the order of FullOrder; `window_rows` of them at a time are sorted by length, cut into batches of
    `batch_rows`, and the batches come in a random order; a rest that is no whole batch comes last. `lengths` are those
    of all rows, (rows,) int64. Holds 8 bytes a row of an epoch.
    """

    def __init__(self, lengths: Tensor, seed: int, *, batch_rows: int, window_rows: int) -> None:
        self._lengths = lengths
        self._seed = seed
        self._batch_rows = batch_rows
        self._window_rows = window_rows
        self._kept: tuple[int, Tensor] | None = None

    def rows(self, epoch: int, begin: int, end: int) -> Tensor:
        """Row numbers of the places `begin` to `end` of an epoch's order."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._sorted(epoch)
        return self._kept[1][begin:end]

    def _sorted(self, epoch: int) -> Tensor:
        order = permutation(len(self._lengths), "order", self._seed, epoch)
        batches = []
        for number, window in enumerate(order.split(self._window_rows)):
            by_length = window[self._lengths[window].argsort(stable=True)]
            whole = len(window) // self._batch_rows
            # What is no whole batch is taken from all lengths: it would be the longest rows of the last window.
            rest = len(window) - whole * self._batch_rows
            left_out = torch.zeros(len(window), dtype=torch.bool)
            left_out[permutation(len(window), "rest of a window", self._seed, epoch, number)[:rest]] = True
            cut = by_length[~left_out].view(whole, self._batch_rows)
            shuffled = permutation(whole, "batches of a window", self._seed, epoch, number)
            batches += [cut[shuffled].flatten(), by_length[left_out]]
        return torch.cat(batches)


class BlockOrder:
    """Runs of `block_rows` neighbouring rows stay near each other in the order, so that a disk reads them in one go.

    The blocks come in a random order, and the rows of WINDOW_BLOCKS blocks at a time are mixed. It holds two numbers a
    block, and the rows of the windows that it was asked for last.
    """

    def __init__(self, num_rows: int, block_rows: int, seed: int) -> None:
        self._num_rows = num_rows
        self._block_rows = block_rows
        self._seed = seed
        self._epoch: int | None = None
        self._blocks = torch.empty(0, dtype=torch.int64)
        self._ends = torch.empty(0, dtype=torch.int64)
        self._windows: dict[int, Tensor] = {}

    def rows(self, epoch: int, begin: int, end: int) -> Tensor:
        """Row numbers of the places `begin` to `end` of an epoch's order."""
        if self._epoch != epoch:
            self._start(epoch)
        if begin == end:
            return torch.empty(0, dtype=torch.int64)
        first, last = torch.searchsorted(self._ends, torch.tensor([begin, end - 1]), right=True).tolist()
        kept, self._windows = self._windows, {}
        parts = []
        for number in range(first, last + 1):
            window = kept[number] if number in kept else self._window(epoch, number)
            self._windows[number] = window
            start = int(self._ends[number]) - len(window)
            parts.append(window[max(0, begin - start) : max(0, end - start)])
        return torch.cat(parts)

    def _start(self, epoch: int) -> None:
        num_blocks = -(-self._num_rows // self._block_rows)
        self._blocks = permutation(num_blocks, "order of blocks", self._seed, epoch)
        lengths = (self._num_rows - self._blocks * self._block_rows).clamp(max=self._block_rows)
        self._ends = torch.stack([window.sum() for window in lengths.split(WINDOW_BLOCKS)]).cumsum(0)
        self._windows = {}
        self._epoch = epoch

    def _window(self, epoch: int, number: int) -> Tensor:
        blocks = self._blocks[number * WINDOW_BLOCKS : (number + 1) * WINDOW_BLOCKS]
        rows = (blocks.unsqueeze(1) * self._block_rows + torch.arange(self._block_rows)).flatten()
        rows = rows[rows < self._num_rows]
        return rows[permutation(len(rows), "order in a window", self._seed, epoch, number)]
