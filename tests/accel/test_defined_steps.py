"""Loss, norm, AdamW and moving average against torch in float64, and to the bit against numpy's single operations."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.accel import defined_steps
from dist_train.accel.defined_arithmetic import DefinedArithmetic
from dist_train.execution.average import MovingAverage
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.execution.optimizer import AdamW
from dist_train.training.loss import DefinedCrossEntropy

SLICES = (4, 0, 7, 1)
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_torch(logits: Tensor, targets: Tensor, weights: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and weight, summed over the rows."""
    members = logits.shape[1] if logits.ndim == 3 else 1
    repeated = targets.repeat_interleave(members)
    of_rows = F.cross_entropy(logits.reshape(-1, 3), repeated, reduction="none", **options).view(-1, members).mean(1)
    by_row = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights
    of_classes = options.get("weight")
    total = by_row if of_classes is None else by_row * of_classes[targets]
    return (of_rows * by_row).sum(), total.sum()


@pytest.mark.parametrize("members", [0, 1, 3, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_and_its_gradient_are_torchs(members: int, smoothing: float, weighted: bool) -> None:
    rows = sum(SLICES)
    logits = 3 * drawn(*((rows, members, 3) if members else (rows, 3)))
    targets = torch.arange(rows) % 3
    by_class = CLASS_WEIGHTS if weighted else None
    by_row = drawn(rows, seed=1).square() if weighted else None
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, weight = DefinedCrossEntropy(by_class, smoothing)(ours, targets, SLICES, by_row)
    (loss * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    parts = zip(
        theirs.split(SLICES), targets.split(SLICES), [None] * 4 if by_row is None else by_row.split(SLICES), strict=True
    )
    expected = [of_torch(*part, weight=by_class, label_smoothing=smoothing) for part in parts]
    torch.testing.assert_close(loss, torch.stack([one for one, _ in expected]))
    torch.testing.assert_close(weight, torch.stack([one for _, one in expected]))
    sum((factor + 1) * one for factor, (one, _) in enumerate(expected)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_slice_has_the_bits_that_it_has_alone() -> None:
    logits, targets = drawn(12, 4, 3).float().requires_grad_(), torch.arange(12) % 3
    objective = DefinedCrossEntropy(CLASS_WEIGHTS.float(), 0.1)
    loss, weight = objective(logits, targets, SLICES)
    loss.sum().backward()
    start = 0
    for place, length in enumerate(SLICES):
        part = slice(start, start + length)
        own = logits.detach()[part].clone().requires_grad_()
        alone = objective(own, targets[part], (length,))
        alone.loss.sum().backward()
        assert alone.loss[0] == loss[place]
        assert alone.weight[0] == weight[place]
        assert logits.grad is not None
        assert own.grad is not None
        assert torch.equal(own.grad, logits.grad[part])
        start += length


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()


def test_twenty_updates_are_those_of_torch() -> None:
    ours, theirs = model(), model()
    settings: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-8}
    optimizer = AdamW(ours, undecayed=set(), arithmetic=DefinedArithmetic(), **settings)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, **settings)
    for step in range(20):
        gradients = optimizer.parameters.zeros()
        for number, (own, other) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            other.grad = drawn(*other.shape, seed=100 * step + number)
            optimizer.parameters.view(gradients, own).copy_(other.grad)
        optimizer.step(gradients, 0.01, finite=True)
        optimizer.step(gradients, 0.01, finite=False)
        plain.step()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)


def test_the_bits_of_an_update_are_those_of_single_operations() -> None:
    f = np.float32
    values, gradient, mean, square = (drawn(33, seed=seed).float().numpy() for seed in range(4))
    square = np.abs(square)
    expected = []
    lr, (beta1, beta2), eps, step, decay = 0.003, (0.9, 0.999), 1e-8, 3, 0.01
    keep, size = f(1 - lr * decay), f(lr / (1 - beta1 * (beta1 * beta1)))
    correction = f(1 / np.sqrt(1 - beta2 * (beta2 * beta2)))
    for w, g, m, s in zip(values, gradient, mean, square, strict=True):
        m = m + f(1 - beta1) * (g - m)
        s = s * f(beta2) + f(1 - beta2) * g * g
        expected.append(w * keep - size * m / (np.sqrt(s) * correction + f(eps)))
    numbers = defined_steps.adamw_settings(lr, (beta1, beta2), eps, step)
    defined_steps.adamw(values, gradient, mean, square, 1.0, decay, numbers)
    np.testing.assert_array_equal(values, np.array(expected, f))


def test_the_moving_average_follows_as_torchs_does() -> None:
    trained = model()
    parameters = FlatParameters(trained.parameters())
    averages = [
        MovingAverage(copy.deepcopy(trained), trained, parameters, 0.9, arithmetic=arithmetic)
        for arithmetic in (None, DefinedArithmetic())
    ]
    for step in range(5):
        with torch.no_grad():
            for number, parameter in enumerate(trained.parameters()):
                parameter.copy_(drawn(*parameter.shape, seed=10 * step + number))
        for average in averages:
            average.update(True)
        if step == 0:
            for own, weights in zip(averages[1].module.parameters(), trained.parameters(), strict=True):
                assert torch.equal(own, weights)
    for theirs, own in zip(*(average.module.parameters() for average in averages), strict=True):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 100])
def test_the_norm_is_that_of_the_numbers(count: int) -> None:
    numbers = drawn(count).float()
    found = DefinedArithmetic().norm(numbers)
    torch.testing.assert_close(found, torch.linalg.vector_norm(numbers.double()))
