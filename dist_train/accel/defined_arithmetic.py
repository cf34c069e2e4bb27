"""The arithmetic of the exact mode, and of scores: the same bits on every processor with a fused multiply-add."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dist_train.accel import defined_products, defined_steps
from dist_train.accel.defined_functions import cosine_of_turns, log, power, softmax
from dist_train.accel.operations_of_torch import OperationsOfTorch
from dist_train.determinism.arithmetic import AdamWSettings, Arithmetic, Floats


class DefinedArithmetic(Arithmetic):
    """Operations by definitions of this package, on the CPU; docs/operations.md lists them.

    Products are defined in float32; in other types they are torch's own.
    """

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """out = a @ (b * factor)."""
        defined_products.product(a, b, out, factor, adds=False)

    def add(self, a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """out += a @ (b * factor)."""
        defined_products.product(a, b, out, factor, adds=True)

    def of_torch(self) -> AbstractContextManager[object]:
        """Inside the block, torch's modules and autograd compute in this way what `operations_of_torch` replaces."""
        return OperationsOfTorch()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax of `defined_functions`; of an ensemble, its members are added up in their order."""
        found = torch.from_numpy(softmax(logits.detach().numpy()))
        if found.ndim == 2:
            return found
        first, *others = found.unbind(1)
        total = first.clone()
        for member in others:
            total += member
        return total / (1 + len(others))

    def norm(self, numbers: Tensor) -> Tensor:
        """Of sums in float64, () float64."""
        return torch.tensor(defined_steps.norm(numbers.numpy()), dtype=torch.float64)

    def adamw(
        self, values: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor],
        steps: Tensor, settings: AdamWSettings, skip: Tensor | None,
    ) -> None:  # fmt: skip
        """An update of AdamW, in place, one operation after the other."""
        if skip is not None and bool(skip):
            return
        numbers = defined_steps.adamw_settings(float(settings.lr), settings.betas, settings.eps, int(steps))
        for tensors in zip(values, gradients, means, squares, strict=True):
            value, gradient, mean, square = (x.numpy() for x in tensors)
            defined_steps.adamw(value, gradient, mean, square, 1.0, settings.weight_decay, numbers)

    def cosine_of_turns(self, turns: float) -> float:
        """That of `defined_functions`."""
        return cosine_of_turns(turns)

    def power(self, base: float, exponent: int) -> float:
        """That of `defined_functions`."""
        return power(base, exponent)

    def log(self, numbers: Floats) -> Floats:
        """That of `defined_functions`."""
        return log(numbers)

    def follow(self, average: Tensor, weights: Tensor, share: float) -> None:
        """average += share * (weights - average), in place, one operation after the other; 1 copies the weights."""
        defined_steps.follow(average.numpy(), weights.detach().numpy(), share)
