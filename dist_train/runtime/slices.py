"""The slices of the batch at hand, and the gradients that modules leave for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_train.runtime.keyed_random import RowRandom


class Slices:
    """How the rows on the table are cut; shared by the modules that compute slice by slice.

    In the exact mode `gradients` holds, for each parameter, the gradient of each slice of this rank, (slices, *shape),
    all of them views of `flat`: modules add to it in their backward pass instead of handing sums to autograd. In the
    fast mode a rank has one slice, all its rows, and `gradients` is None.
    """

    def __init__(self, random: RowRandom | None = None) -> None:
        self.lengths: tuple[int, ...] = ()
        self.gradients: dict[nn.Parameter, Tensor] | None = None
        self.flat = torch.empty(0)
        self._random = random or RowRandom(0)
        self._place = (0, 0)

    def begin(self, lengths: tuple[int, ...], epoch: int, first_row: int) -> None:
        """The rows that follow consist of slices of these lengths, from place `first_row` of the epoch's order on."""
        self.lengths = lengths
        self._place = (epoch, first_row)
        self._random.begin(epoch, first_row)

    def keep_gradients(self, parameters: Sequence[nn.Parameter], num_slices: int) -> None:
        """Exact mode: keep the gradients of each slice apart."""
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros((num_slices, sum(sizes)), dtype=parameters[0].dtype, device=parameters[0].device)
        views = self.flat.split(sizes, 1)
        self.gradients = {p: view.unflatten(1, p.shape) for p, view in zip(parameters, views, strict=True)}

    def split(self, rows: Tensor) -> list[Tensor]:
        """Each slice's rows as a tensor of its own.

        Copies, where there are several: kernels may round differently where a tensor begins at another place in
        memory, and where a slice begins depends on the world size.
        """
        if len(self.lengths) <= 1:
            return [rows]
        return [part.clone() for part in rows.split(self.lengths)]

    def each(self, rows: Tensor) -> Iterator[Tensor]:
        """Each slice's rows in turn, with the row-keyed randomness set to them."""
        epoch, first_row = self._place
        for part in self.split(rows):
            self._random.begin(epoch, first_row)
            yield part
            first_row += len(part)
