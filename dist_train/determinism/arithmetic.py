"""The operations of a step and of a score that libraries round in ways of their own.

Here they are torch's. The exact mode, and scores, can have others, whose every bit is defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")


def written_out(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a pass that takes its products from an Arithmetic: nobody looks through it for those of torch.

    To do so takes longer than a small operation itself.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C._DisableTorchDispatch():
            return function(*args, **kwargs)

    return call


class AdamWSettings(NamedTuple):
    """Of one update of a group of parameters."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Arithmetic:
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
        """Inside the block, torch's modules and autograd compute in this way too."""
        return nullcontext()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits, (rows, classes) or (rows, members, classes) -> (rows, classes) float64.

        Softmax over the classes; of an ensemble, the mean over its members.
        """
        probabilities = logits.double().softmax(-1)
        return probabilities if probabilities.ndim == 2 else probabilities.mean(1)

    def norm(self, numbers: Tensor) -> Tensor:
        """Euclidean norm of flat numbers, ()."""
        norm: Tensor = torch.linalg.vector_norm(numbers)
        return norm

    def adamw(
        self, values: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor],
        steps: Tensor, settings: AdamWSettings, skip: Tensor | None,
    ) -> None:  # fmt: skip
        """An update of AdamW, in place; `steps`, (), counts this one already. Where `skip`, (), is 1: none."""
        torch._fused_adamw_(
            values, gradients, means, squares, [], [steps] * len(values),
            lr=settings.lr, beta1=settings.betas[0], beta2=settings.betas[1], weight_decay=settings.weight_decay,
            eps=settings.eps, amsgrad=False, maximize=False, grad_scale=None, found_inf=skip,
        )  # fmt: skip

    def cosine_of_turns(self, turns: float) -> float:
        """cos(2 pi turns)."""
        return math.cos(math.pi * (2 * turns))

    def power(self, base: float, exponent: int) -> float:
        """The base to the power of a whole number that is not negative."""
        return float(base**exponent)

    def log(self, numbers: Floats) -> Floats:
        """The natural logarithm of each number."""
        return np.log(numbers)

    def follow(self, average: Tensor, weights: Tensor, share: float) -> None:
        """average += share * (weights - average), in place."""
        average.lerp_(weights, share)
