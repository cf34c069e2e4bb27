"""Matrix products of the modules whose passes are written out, and probabilities of what a model gives.

The exact mode, and scores, can have ones of their own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor


class Products:
    """torch's own: as fast as its library is, rounded as that one likes on this processor.

    Matrices are (rows, inner) and (inner, columns) of one type on one device, or batches of them with an axis in front.
    """

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """out = a @ (b * factor)."""
        if out.ndim == 3:
            out.baddbmm_(a, b, beta=0, alpha=factor)
        else:
            out.addmm_(a, b, beta=0, alpha=factor)

    def add(self, a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """out += a @ (b * factor)."""
        if out.ndim == 3:
            out.baddbmm_(a, b, alpha=factor)
        else:
            out.addmm_(a, b, alpha=factor)

    def of_torch(self) -> AbstractContextManager[object]:
        """Inside the block, what torch's modules and autograd multiply is multiplied in this way."""
        return nullcontext()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits, (rows, classes) or (rows, members, classes) -> (rows, classes) float64.

        Softmax over the classes; of an ensemble, the mean over its members.
        """
        probabilities = logits.double().softmax(-1)
        return probabilities if probabilities.ndim == 2 else probabilities.mean(1)
