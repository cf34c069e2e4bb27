"""Dropout keyed by the row: statistics of a fair coin, and the same mask wherever the row is computed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.determinism.dropout import KeyedDropout, convert_dropout
from dist_train.models.financial_classifier import FinancialClassifier
from tests.determinism.contexts import context_at


def mask(p: float, rows: int, width: int, *, seed: int = 0, epoch: int = 0, first: int = 0, layer: str = "a") -> Tensor:
    """What the layer makes of ones: 0 where dropped, the scale where kept."""
    context = context_at(epoch, first, seed=seed)
    kept: Tensor = KeyedDropout(p, layer, context)(torch.ones(rows, width, dtype=torch.float64))
    return kept


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_rate_and_expectation(p: float) -> None:
    kept = mask(p, 1000, 401)
    count = kept.numel()
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(kept.eq(0).double().mean().item() - p) < 5 * deviation + 1 / 65536
    assert kept.unique().numel() == 2
    # The scale is the exact complement of the rounded rate, so the expectation is kept exactly.
    assert kept.max().item() == pytest.approx(1 / (1 - p), rel=1 / 65536 / (1 - p))
    assert abs(kept.mean().item() - 1) < 5 * (p / (1 - p) / count) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_values_are_scaled_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 1 / 0.7 is 1.4297: every kept value would be 0.08 % too large."""
    layer = KeyedDropout(0.3, "a", context_at())
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype
    kept = out != 0
    assert torch.equal(out[kept], (x.float() * layer.scale).to(dtype)[kept])
    out.backward(x.detach())
    assert x.grad is not None
    assert torch.equal(x.grad, out)


def test_extreme_rates() -> None:
    x = torch.randn(4, 3)
    assert KeyedDropout(0.0, "a", ModelContext())(x) is x
    almost = mask(0.9999999, 100, 100)
    assert almost.isfinite().all()
    assert almost.eq(0).double().mean() > 0.99


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 384])
def test_a_row_keeps_its_mask_however_the_batch_is_cut(width: int) -> None:
    whole = mask(0.4, 97, width, epoch=3, first=1000)
    for cuts in ([0, 97], [0, 1, 97], [0, 50, 50, 96, 97]):
        parts = [mask(0.4, b - a, width, epoch=3, first=1000 + a) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    assert mask(0.4, 0, width).shape == (0, width)


def test_masks_differ_between_layers_epochs_seeds_and_rows() -> None:
    base = mask(0.5, 64, 64)
    others = [mask(0.5, 64, 64, seed=1), mask(0.5, 64, 64, epoch=1), mask(0.5, 64, 64, layer="b")]
    for other in [*others, mask(0.5, 64, 64, first=64), base.roll(1, 0), base.roll(1, 1)]:
        assert 0.45 < base.eq(other).double().mean() < 0.55


def test_a_step_in_an_epoch_beyond_32_bits_of_rows() -> None:
    """Billions of rows: the counter wraps as unsigned arithmetic does, without an error and without repeating."""
    far = mask(0.5, 64, 64, first=5_000_000_000)
    assert 0.45 < far.eq(mask(0.5, 64, 64)).double().mean() < 0.55
    assert torch.equal(far[10:], mask(0.5, 54, 64, first=5_000_000_010))


def test_evaluation_is_the_identity() -> None:
    x = torch.randn(5, 6)
    assert KeyedDropout(0.5, "a", ModelContext()).eval()(x) is x


def test_backward_uses_the_mask_of_forward() -> None:
    context = ModelContext()
    layer = KeyedDropout(0.5, "a", context)
    x = torch.ones(50, 7, requires_grad=True)
    with context.bound(BatchContext(0, 5)):
        out = layer(x)
    with context.bound(BatchContext(4, 0)):  # the next pass has begun before this one's backward
        out.sum().backward()
    assert torch.equal(x.grad, out.detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_type_is_kept(dtype: torch.dtype) -> None:
    out = KeyedDropout(0.3, "a", context_at())(torch.ones(9, 2, 3, dtype=dtype))
    assert (out.dtype, out.shape) == (dtype, (9, 2, 3))


def test_conversion_finds_every_dropout_and_names_them_apart() -> None:
    context = ModelContext()
    model = convert_dropout(FinancialClassifier(4, 8, 2), context)
    layers = [m for m in model.modules() if isinstance(m, KeyedDropout)]
    assert [m.purpose for m in layers] == ["dropout layers.3", "dropout layers.6"]
    assert all(m.context is context for m in layers)
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())


def chi_square_bound(cells: int) -> float:
    """Five standard deviations above the mean of the chi-square distribution with cells - 1 degrees of freedom."""
    return (cells - 1) + 5 * (2 * (cells - 1)) ** 0.5


def test_bits_are_uniform_and_neighbours_are_independent() -> None:
    bits = context_at(2, 777, seed=3).bits16("dropout", 2000, 390, torch.empty(0)).numpy().astype(np.int64) + 32768
    for shift in (0, 8, 12):  # low, middle and high bits: any linear pattern shows in one of them
        counts = np.bincount(((bits >> shift) & 15).ravel(), minlength=16)
        expected = bits.size / 16
        assert ((counts - expected) ** 2 / expected).sum() < chi_square_bound(16)
    coarse = bits >> 13  # 8 levels
    for one, other in ((coarse[:-1], coarse[1:]), (coarse[:, :-1], coarse[:, 1:]), (coarse[:, :-4], coarse[:, 4:])):
        counts = np.bincount((one * 8 + other).ravel(), minlength=64)
        expected = one.size / 64
        assert ((counts - expected) ** 2 / expected).sum() < chi_square_bound(64)


def test_a_dropout_at_two_places_is_one_keyed_dropout_at_both() -> None:
    shared = nn.Dropout(0.5)
    model = convert_dropout(nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared), ModelContext())
    assert isinstance(model[1], KeyedDropout)
    assert model[1] is model[3]
    assert isinstance(convert_dropout(nn.Dropout(0.5), ModelContext()), KeyedDropout)
