"""What is minimised: the loss as a numerator and a denominator, each a sum over this rank's rows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.determinism.slices import split_slices


class LossSum(NamedTuple):
    """Per slice of the batch, (slices,): the `loss` summed over rows, and the `weight` to divide it by in the end.

    The sums of all slices of all ranks are added up before they are divided, once.
    """

    loss: Tensor
    weight: Tensor


class Objective(Protocol):
    """The loss of a batch."""

    def __call__(self, logits: Tensor, targets: Tensor, slices: tuple[int, ...]) -> LossSum:
        """Sums of `logits`, (rows, classes) or (rows, members, classes), against class indices, (rows,), per slice."""


class CrossEntropy:
    """Cross-entropy with class weights, (classes,), and label smoothing; the mean is that of F.cross_entropy.

    Of an ensemble it is the mean over the members of each member's own loss: members are trained, not their average.
    """

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self._counted: dict[tuple[int, ...], Tensor] = {}  # rows of slices: a batch has one of a few shapes

    def __call__(self, logits: Tensor, targets: Tensor, slices: tuple[int, ...]) -> LossSum:
        """Sums over the rows of each slice; a slice without rows has loss 0 and weight 0."""
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        parts = list(zip(split_slices(logits, slices), targets.split(slices), strict=True))
        losses = [self._sum(own, targets) for own, targets in parts]
        loss = losses[0].unsqueeze(0) if len(losses) == 1 else torch.stack(losses)
        return LossSum(loss, self._weights(slices, [targets for _, targets in parts], loss))

    def _weights(self, slices: tuple[int, ...], targets: list[Tensor], like: Tensor) -> Tensor:
        weights = self.class_weights
        if weights is not None:
            return torch.stack([weights[of_slice].sum() for of_slice in targets])
        if slices not in self._counted:
            self._counted[slices] = like.new_tensor(slices)
        return self._counted[slices]

    def _sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        members = logits.shape[1] if logits.ndim == 3 else 1
        if members > 1:
            logits, targets = logits.flatten(0, 1), targets.repeat_interleave(members)
        elif logits.ndim == 3:
            logits = logits.squeeze(1)
        loss = F.cross_entropy(
            logits, targets, self.class_weights, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return loss / members if members > 1 else loss


def class_probabilities(logits: Tensor) -> Tensor:
    """Logits, (rows, classes) or (rows, members, classes) -> (rows, classes) float64.

    Softmax over the classes; of an ensemble, the mean over its members.
    """
    probabilities = logits.double().softmax(-1)
    return probabilities if probabilities.ndim == 2 else probabilities.mean(1)


def balanced_weights(targets: Tensor, num_classes: int) -> Tensor:
    """Weights inverse to class frequency with mean 1 over the rows: rows / (classes * rows of the class), float64."""
    counts = torch.bincount(targets, minlength=num_classes).double()
    return len(targets) / (num_classes * counts)
