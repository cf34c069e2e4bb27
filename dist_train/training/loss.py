"""What is minimised: the loss as a numerator and a denominator, each a sum over this rank's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_train.accel.defined_steps import cross_entropy
from dist_train.config.schema import TrainConfig
from dist_train.determinism.slices import split_slices
from dist_train.errors import UserError
from dist_train.plugins import Registry


class LossSum(NamedTuple):
    """Per slice of the batch, (slices,): the `loss` summed over rows, and the `weight` to divide it by in the end.

    The sums of all slices of all ranks are added up before they are divided, once.
    """

    loss: Tensor
    weight: Tensor


class Objective(Protocol):
    """The loss of a batch."""

    def __call__(
        self, logits: Tensor, targets: Tensor, slices: tuple[int, ...], weights: Tensor | None = None
    ) -> LossSum:
        """Sums of `logits`, (rows, classes) or (rows, members, classes), against class indices, (rows,), per slice.

        `weights` of the rows, (rows,), multiply their losses and add up to the weight; None: each counts 1.
        """


class CrossEntropy:
    """Cross-entropy with class weights, (classes,), and label smoothing; the mean is that of F.cross_entropy.

    A row's weight multiplies the weight of its class. Of an ensemble it is the mean over the members of each member's
    own loss: members are trained, not their average.
    """

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self._counted: dict[tuple[int, ...], Tensor] = {}  # rows of slices: a batch has one of a few shapes

    def __call__(
        self, logits: Tensor, targets: Tensor, slices: tuple[int, ...], weights: Tensor | None = None
    ) -> LossSum:
        """Sums over the rows of each slice; a slice without rows has loss 0 and weight 0."""
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        parts = list(zip(split_slices(logits, slices), targets.split(slices), strict=True))
        if weights is not None:
            return self._weighted(parts, weights.to(logits.dtype).split(slices))
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

    def _weighted(self, parts: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor]) -> LossSum:
        losses, sums = [], []
        for (logits, targets), own in zip(parts, weights, strict=True):
            of_rows = self._cross_entropy(logits, targets, "none")
            losses.append((of_rows.view(len(own), -1).mean(1) * own).sum() if len(own) else logits.sum())
            sums.append((own if self.class_weights is None else own * self.class_weights[targets]).sum())
        return LossSum(torch.stack(losses), torch.stack(sums))

    def _sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        members = logits.shape[1] if logits.ndim == 3 else 1
        loss = self._cross_entropy(logits, targets, "sum")
        return loss / members if members > 1 else loss

    def _cross_entropy(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Of rows, or of rows and members: a row's members follow each other."""
        members = logits.shape[1] if logits.ndim == 3 else 1
        if members > 1:
            logits, targets = logits.flatten(0, 1), targets.repeat_interleave(members)
        elif logits.ndim == 3:
            logits = logits.squeeze(1)
        return F.cross_entropy(
            logits, targets, self.class_weights, label_smoothing=self.label_smoothing, reduction=reduction
        )


class DefinedCrossEntropy(CrossEntropy):
    """The same of float32 or float64 on the CPU, in the compiled code of `defined_steps`: every bit is defined."""

    def __call__(
        self, logits: Tensor, targets: Tensor, slices: tuple[int, ...], weights: Tensor | None = None
    ) -> LossSum:
        """Sums over the rows of each slice, float64; a slice without rows has loss 0 and weight 0."""
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        own = self.class_weights
        by_class = np.ones(logits.shape[-1]) if own is None else own.double().numpy()
        by_row = np.empty(0) if weights is None else weights.double().numpy()
        return LossSum(*_DefinedSums.apply(logits, targets, slices, by_class, by_row, self.label_smoothing))


class _DefinedSums(torch.autograd.Function):
    """Loss and weight of each slice, (slices,) float64; a graph goes backward once."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, slices: tuple[int, ...], by_class: Any, by_row: Any, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        gradient = logits.detach().clone(memory_format=torch.contiguous_format)
        members = logits.shape[1] if logits.ndim == 3 else 1
        rows, classes = gradient.view(-1, logits.shape[-1]).numpy(), targets.numpy()
        sums = np.zeros((len(slices), 2))
        start = 0
        for length, of_slice in zip(slices, sums, strict=True):
            end = start + length
            own = rows[start * members : end * members]
            cross_entropy(own, classes[start:end], by_class, by_row[start:end], members, smoothing, of_slice)
            start = end
        ctx.gradient, ctx.slices = gradient, slices
        loss, weight = torch.from_numpy(sums).unbind(1)
        ctx.mark_non_differentiable(weight)
        return loss, weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        for own, factor in zip(ctx.gradient.split(ctx.slices), of_loss.tolist(), strict=True):
            own *= factor
        return ctx.gradient, None, None, None, None, None


class NegativeLogLikelihood(CrossEntropy):
    """The same of log-likelihoods in the place of logits: of what a row is, whatever the other classes have."""

    def _cross_entropy(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return F.nll_loss(logits, targets, self.class_weights, reduction=reduction)


RowLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits, (rows, classes), and class indices, (rows,) int64 -> the loss of each row, (rows,)."""
_AnyRowLoss = TypeVar("_AnyRowLoss", bound=RowLoss)

_LOSSES: Registry[RowLoss | None] = Registry("loss", "train.loss", "dist_train.losses", {"cross_entropy": None})


def register_loss(name: str) -> Callable[[_AnyRowLoss], _AnyRowLoss]:
    """Decorator that makes a function the loss `name`, for `train.loss=<name>`.

    The function gets logits, (rows, classes) float32 or float64, and class indices, (rows,) int64, on the device, and
    returns the loss of each row, (rows,); the rows must not depend on each other. `train.class_weights` and
    `data.weight` weigh the rows as they do in cross-entropy. Of an ensemble of members each row and member counts as a
    row.

        >>> import torch
        >>> from dist_train import register_loss
        >>> @register_loss("brier")
        ... def brier(logits, targets):
        ...     hot = torch.nn.functional.one_hot(targets, logits.shape[1])
        ...     return (logits.softmax(1) - hot).square().sum(1)

    Raises:
        ValueError: the name is empty, or a loss of this package has it.
    """

    def register(loss: _AnyRowLoss) -> _AnyRowLoss:
        _LOSSES.register(name, loss)
        return loss

    return register


def objective_of(train: TrainConfig, class_weights: Tensor | None, *, defined: bool = False) -> Objective:
    """The loss that `train.loss` names, with class weights, (classes,); `defined`: cross-entropy has defined bits.

    Raises:
        UserError: there is no such loss, or it has no label smoothing.
    """
    loss = _LOSSES.find(train.loss)
    if loss is None:
        kind = DefinedCrossEntropy if defined else CrossEntropy
        return kind(class_weights, train.label_smoothing)
    if train.label_smoothing:
        raise UserError(f"train.label_smoothing: only cross_entropy has it, and train.loss is {train.loss}")
    return RegisteredLoss(train.loss, loss, class_weights)


class RegisteredLoss:
    """A loss from outside this package, summed per slice; the mean is over the weights of rows and of their classes."""

    def __init__(self, name: str, row_loss: RowLoss, class_weights: Tensor | None = None) -> None:
        self.name = name
        self.class_weights = class_weights
        self._row_loss = row_loss

    def __call__(
        self, logits: Tensor, targets: Tensor, slices: tuple[int, ...], weights: Tensor | None = None
    ) -> LossSum:
        """Sums over the rows of each slice; a slice without rows has loss 0 and weight 0."""
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        of_slices = [None] * len(slices) if weights is None else weights.to(logits.dtype).split(slices)
        parts = zip(split_slices(logits, slices), targets.split(slices), of_slices, strict=True)
        losses, sums = zip(*(self._sums(*part) for part in parts), strict=True)
        return LossSum(torch.stack(losses), torch.stack(sums))

    def _sums(self, logits: Tensor, targets: Tensor, of_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        members = logits.shape[1] if logits.ndim == 3 else 1
        if len(targets) == 0:
            return logits.sum(), logits.new_zeros(())
        by_member = logits.flatten(0, 1) if logits.ndim == 3 else logits
        losses = self._losses(by_member, targets.repeat_interleave(members)).view(-1, members).mean(1)
        weights = torch.ones_like(losses) if self.class_weights is None else self.class_weights[targets]
        weights = weights if of_rows is None else weights * of_rows
        return (losses * weights).sum(), weights.sum().detach()

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        try:
            losses = self._row_loss(logits, targets)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"train.loss: the loss {self.name!r} failed: {reason}") from error
        if not isinstance(losses, Tensor) or losses.shape != targets.shape:
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(
                f"train.loss: the loss {self.name!r} must give one number a row, {tuple(targets.shape)}, not {found}"
            )
        return losses


def balanced_draws(targets: Tensor, num_classes: int) -> Tensor:
    """How often a row of each class is expected in an epoch of balanced draws, float64; 0 of a class without rows."""
    counts = torch.bincount(targets, minlength=num_classes).double()
    return torch.where(counts > 0, len(targets) / ((counts > 0).sum() * counts), 0.0)


def balanced_weights(targets: Tensor, num_classes: int, weights: Tensor | None = None) -> Tensor:
    """Weights inverse to class frequency with mean 1 over the rows: rows / (classes * rows of the class), float64.

    Rows count as much as their `weights`, (rows,) float64, say; None: each counts 1.
    """
    counts = torch.bincount(targets, weights, minlength=num_classes).double()
    total = len(targets) if weights is None else counts.sum()
    return total / (num_classes * counts)
