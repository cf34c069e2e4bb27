"""What is minimised: the loss as a numerator and a denominator, each a sum over this rank's rows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.training.protocols import Batch


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
        self._counted: dict[tuple[int, ...], Tensor] = {}  # rows of slices: a batch has one of a few shapes

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        """Sums over the rows of each slice; a slice without rows has loss 0 and weight 0."""
        logits = model(*batch.inputs)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        lengths, targets = batch.slices, batch.targets
        if len(lengths) == 1:
            parts = [(logits, targets)]
        else:
            # Copies: a kernel may round differently where a slice begins at another place in memory.
            parts = [(a.clone(), t) for a, t in zip(logits.split(lengths), targets.split(lengths), strict=True)]
        losses = [self._sum(own, targets) for own, targets in parts]
        loss = losses[0].unsqueeze(0) if len(losses) == 1 else torch.stack(losses)
        return LossSum(loss, self._weights(batch, [targets for _, targets in parts], loss))

    def _weights(self, batch: Batch, targets: list[Tensor], like: Tensor) -> Tensor:
        weights = self.class_weights
        if weights is not None:
            return torch.stack([weights[of_slice].sum() for of_slice in targets])
        if batch.slices not in self._counted:
            self._counted[batch.slices] = like.new_tensor(batch.slices)
        return self._counted[batch.slices]

    def _sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, targets, self.class_weights, label_smoothing=self.label_smoothing, reduction="sum"
        )


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
