"""The compiled passes against numpy, and their random bits against `RowRandom`."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch

from dist_train.accel import cpu_kernels
from dist_train.accel.compiled import compiled
from dist_train.determinism.dropout import NOTHING_DROPPED
from dist_train.determinism.keyed_random import RowRandom

ROWS, FEATURES = 37, 13
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def some(*shape: int, dtype: Any = np.float64, key: int = 0) -> Any:
    return np.random.default_rng(key).normal(size=shape).astype(dtype)


def tolerance(dtype: Any) -> float:
    return 1e-6 if dtype == np.float32 else 1e-14


@DTYPES
def test_observe_and_merge(dtype: Any) -> None:
    rows = some(ROWS, FEATURES, dtype=dtype) + dtype(1000)  # far from zero
    parts = np.zeros((4, 3, FEATURES))
    for part, (a, b) in zip(parts, ((0, 5), (5, 5), (5, 6), (6, ROWS)), strict=True):
        part[0] = b - a
        cpu_kernels.batch_norm_stats(np.ascontiguousarray(rows[a:b]), part)
    whole = np.full((3, FEATURES), np.nan)
    cpu_kernels.batch_norm_gather_stats(parts, whole)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(whole, [np.full(FEATURES, ROWS), wide.mean(0), wide.var(0)], rtol=1e-10)
    cpu_kernels.batch_norm_gather_stats(parts[1:2], whole)
    assert (whole == 0).all()


@DTYPES
def test_normalise_and_follow(dtype: Any) -> None:
    whole, merged = (
        np.stack([np.full(FEATURES, ROWS), some(FEATURES), some(FEATURES, key=1) ** 2]),
        np.zeros((3, FEATURES)),
    )
    _, mean, var = whole
    weight, bias, offset = (some(FEATURES, dtype=dtype, key=key) for key in (2, 3, 4))
    inverse_std, scale, shift = np.zeros(FEATURES), np.zeros(FEATURES, dtype), np.zeros(FEATURES, dtype)
    assert (
        cpu_kernels.batch_norm_scale_shift(whole[None], merged, 1e-5, weight, bias, inverse_std, scale, shift) == ROWS
    )
    np.testing.assert_allclose(merged, whole, rtol=1e-14)
    rows = some(ROWS, FEATURES)
    expected = torch.nn.functional.batch_norm(
        torch.from_numpy(rows), torch.from_numpy(mean), torch.from_numpy(var),
        torch.from_numpy(weight).double(), torch.from_numpy(bias).double(),
    )  # fmt: skip
    np.testing.assert_allclose(rows * scale + shift, expected, rtol=10 * tolerance(dtype), atol=10 * tolerance(dtype))
    running = [np.ones(FEATURES, dtype) for _ in range(2)]
    cpu_kernels.update_running_stats(*running, whole, offset, 0.25)
    for average, now in zip(running, (mean + offset, var * ROWS / (ROWS - 1)), strict=True):
        np.testing.assert_allclose(average, 0.75 + 0.25 * now, rtol=tolerance(dtype))


@DTYPES
@pytest.mark.parametrize("features", [1, 4, 7, 256])
@pytest.mark.parametrize("threshold", [NOTHING_DROPPED, None, 32767])
def test_activate_draws_the_bits_of_the_rows(dtype: Any, features: int, threshold: int | None) -> None:
    random = RowRandom(4)
    first = random.counter("dropout", features, 3, 5_000_000_000)
    bits = random.bits16(first, ROWS, features, torch.device("cpu")).numpy()
    threshold = int(bits[3, 0]) if threshold is None else threshold  # so that one number is just kept
    rows, scale, shift = some(ROWS, features, dtype=dtype), some(features, dtype=dtype), some(features, dtype=dtype)
    out = np.full_like(rows, np.nan)
    cpu_kernels.affine_relu_dropout(rows, scale, shift, first, threshold, out)
    expected = np.where(bits >= threshold, np.maximum(rows * scale + shift, 0), 0)
    np.testing.assert_array_equal(out, expected.astype(dtype))
    # A row is the same whichever rows are beside it: with vector instructions or without.
    eleventh = random.counter("dropout", features, 3, 5_000_000_000 + 11)
    alone = np.zeros((1, features), dtype)
    cpu_kernels.affine_relu_dropout(rows[11:12].copy(), scale, shift, eleventh, threshold, alone)
    np.testing.assert_array_equal(alone[0], out[11])


def test_activate_shows_what_is_not_a_number() -> None:
    rows = np.array([[np.nan, np.inf, -np.inf, -1.0, 2.0]])
    out = np.zeros_like(rows)
    cpu_kernels.affine_relu_dropout(rows, np.ones(5), np.zeros(5), 0, NOTHING_DROPPED, out)
    np.testing.assert_array_equal(out, [[np.nan, np.inf, 0, 0, 2]])


@DTYPES
def test_withdraw(dtype: Any) -> None:
    gradient, sums, activations = (some(ROWS, FEATURES, dtype=dtype, key=key) for key in range(3))
    kept = np.where(activations > 0, gradient, 0)
    totals = np.ones((2, FEATURES))
    cpu_kernels.relu_dropout_backward(gradient, sums, activations, totals)
    np.testing.assert_array_equal(activations, kept)
    wide = kept.astype(np.float64)
    np.testing.assert_allclose(totals, [1 + wide.sum(0), 1 + (wide * sums).sum(0)], rtol=1e-12)


@DTYPES
def test_add_rows(dtype: Any) -> None:
    rows, gradient = some(ROWS, FEATURES, dtype=dtype), np.ones(FEATURES, dtype)
    cpu_kernels.add_rows(gradient, rows)
    np.testing.assert_allclose(
        gradient, 1 + rows.astype(np.float64).sum(0), rtol=tolerance(dtype), atol=tolerance(dtype)
    )


@DTYPES
def test_gradient_of_a_batch_norm(dtype: Any) -> None:
    """`project`, `correct` and `propagate` together are autograd's gradient of torch's own BatchNorm."""
    rows, gradient, weight = some(ROWS, FEATURES), some(ROWS, FEATURES, key=1), some(FEATURES, key=2)
    x = torch.from_numpy(rows).requires_grad_()
    w = torch.from_numpy(weight).requires_grad_()
    torch.nn.functional.batch_norm(x, None, None, w, training=True).backward(torch.from_numpy(gradient))
    assert x.grad is not None
    assert w.grad is not None
    mean, inverse_std = rows.mean(0), 1 / np.sqrt(rows.var(0) + 1e-5)
    halves = [np.stack([g.sum(0), (g * r).sum(0)]) for g, r in ((gradient[:9], rows[:9]), (gradient[9:], rows[9:]))]
    totals = np.stack(halves)
    cpu_kernels.batch_norm_backward_reduce(totals, mean, inverse_std)
    added = np.zeros(FEATURES, dtype)
    for own in totals:
        cpu_kernels.add(added, own[1])
    np.testing.assert_allclose(added, w.grad, rtol=100 * tolerance(dtype), atol=100 * tolerance(dtype))
    scale, z_coef, const_coef = (np.zeros(FEATURES, dtype) for _ in range(3))
    scale[:] = inverse_std * weight
    cpu_kernels.batch_norm_backward_coefficients(
        totals.sum(0), float(ROWS), mean, inverse_std, weight, z_coef, const_coef
    )
    found = gradient.astype(dtype)
    cpu_kernels.batch_norm_backward_elemt(found, rows.astype(dtype), scale, z_coef, const_coef)
    np.testing.assert_allclose(found, x.grad, rtol=1e3 * tolerance(dtype), atol=10 * tolerance(dtype))


def test_without_a_place_for_machine_code_each_process_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def nowhere(*arguments: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    monkeypatch.setattr(numba, "njit", lambda *a, **o: (lambda f: nowhere(f, **o)) if not a else nowhere(*a, **o))

    def double(x: float) -> float:
        return 2 * x

    assert compiled(double)(4.0) == 8.0
