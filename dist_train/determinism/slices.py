"""The slices of the batch at hand, and the gradients that modules leave for each of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from dist_train.determinism.flat_parameters import FlatParameters
from dist_train.determinism.keyed_random import RowRandom


class Slices:
    """How the rows on the table are cut; shared by the modules that compute slice by slice.

    Where `gradients` is set, it holds for each slice of this rank the gradient of each parameter: modules add to it in
    their backward pass instead of handing sums to autograd. In the fast mode a rank has one slice, all its rows; where
    DistributedDataParallel reduces it, `visit_all_parameters` says that autograd must still come to each parameter.
    """

    def __init__(self, random: RowRandom | None = None) -> None:
        self.lengths: tuple[int, ...] = ()
        self.gradients: list[dict[nn.Parameter, Tensor]] | None = None
        self.visit_all_parameters = False
        self._random = random or RowRandom(0)
        self._place = (0, 0)

    def begin(self, lengths: tuple[int, ...], epoch: int, first_row: int) -> None:
        """The rows that follow consist of slices of these lengths, from place `first_row` of the epoch's order on."""
        self.lengths = lengths
        self._place = (epoch, first_row)
        self._random.begin(epoch, first_row)

    def keep_gradients(self, parameters: FlatParameters, num_slices: int) -> Tensor:
        """Keep the gradients of each slice apart, as views of the tensor that is returned: (slices, size)."""
        flat = parameters.zeros(num_slices)
        self.gradients = [{p: parameters.view(own, p) for p in parameters.parameters} for own in flat]
        return flat

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
        place = 0
        for part in self.split(rows):
            self.go_to(place)
            yield part
            place += len(part)

    def go_to(self, place: int) -> None:
        """The row-keyed randomness that is drawn next is that of the rows from `place` on, counted within the batch."""
        epoch, first_row = self._place
        self._random.begin(epoch, first_row + place)
