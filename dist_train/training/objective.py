"""What is minimised: the loss as a numerator and a denominator, each a sum over this rank's rows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.training.parts import Batch


class LossSum(NamedTuple):
    """Per slice of the batch, (slices,): the `loss` summed over rows, and the `weight` to divide it by in the end.

    The sums of all slices of all ranks are added up before they are divided, once.
    """

    loss: Tensor
    weight: Tensor


class Objective(Protocol):
    """The loss of a batch."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum: ...


class CrossEntropy:
    """Cross-entropy with class weights, (classes,), and label smoothing; the mean is that of F.cross_entropy."""

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        """Sums over the rows of each slice; a slice without rows has loss 0 and weight 0."""
        logits = model(*batch.inputs)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        # Copies: a kernel may round differently where a slice begins at another place in memory.
        pairs = [
            (a.clone(), t) for a, t in zip(logits.split(batch.slices), batch.targets.split(batch.slices), strict=True)
        ]
        losses = torch.stack([self._sum(own, targets) for own, targets in pairs])
        if self.class_weights is None:
            return LossSum(losses, losses.new_tensor(batch.slices))
        weights = self.class_weights
        return LossSum(losses, torch.stack([weights[targets].sum() for _, targets in pairs]))

    def _sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, targets, self.class_weights, label_smoothing=self.label_smoothing, reduction="sum"
        )


def balanced_weights(targets: Tensor, num_classes: int) -> Tensor:
    """Weights inverse to class frequency with mean 1 over the rows: rows / (classes * rows of the class), float64."""
    counts = torch.bincount(targets, minlength=num_classes).double()
    return len(targets) / (num_classes * counts)
