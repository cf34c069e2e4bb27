"""Products whose bits are defined: library and kernel against a reference in fractions, in any shape and memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor, nn

from dist_train.accel import defined_products, operations_of_torch
from dist_train.accel.defined_arithmetic import DefinedArithmetic
from dist_train.accel.defined_products import FOLD
from dist_train.determinism.arithmetic import written_out

SIZES = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33, 64])
INNER = st.sampled_from([0, 1, 3, 4, 50, 127, 128, 129, 300])
SCALES = st.sampled_from([1.0, 1e-20, 1e18, 1e-38])


def bits(numbers: Tensor) -> Any:
    return numbers.detach().contiguous().numpy().view(np.int32)


def nearest(exact: Fraction) -> np.float32:
    """The float32 number nearest to a fraction, the even one of two."""
    near = np.float32(float(exact))
    candidates = [near, *(np.nextafter(near, np.float32(to)) for to in (-np.inf, np.inf))]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.int32)) & 1))


def reference(a: Tensor, b: Tensor, row: int, column: int, start: float) -> np.float32:
    """An element of start + a @ b, rounded after each step as the definition says."""
    total = np.float32(start)
    for begin in range(0, a.shape[1], FOLD):
        part = np.float32(0)
        for x, y in zip(a[row, begin : begin + FOLD].tolist(), b[begin : begin + FOLD, column].tolist(), strict=True):
            part = nearest(Fraction(x) * Fraction(y) + Fraction(float(part)))
        total = nearest(Fraction(float(total)) + Fraction(float(part)))
    return total


def matrix(rows: int, columns: int, seed: int, scale: float, layout: str) -> Tensor:
    """Numbers of many sizes and both signs, in memory that is laid out in a way of its own."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows + 3, columns + 5, generator=random) * torch.logspace(-3, 3, columns + 5) * scale
    inside = wide[2 : 2 + rows, 3 : 3 + columns]
    if layout == "transposed":
        return inside.t().contiguous().t()
    if layout == "a row for all":
        return inside[:1].expand(rows, columns)
    return inside if layout == "inside" else inside.contiguous()


LAYOUTS = st.sampled_from(["plain", "transposed", "inside", "a row for all"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZES, SIZES, INNER, SCALES, LAYOUTS, LAYOUTS, st.booleans(), st.integers(0, 999))
def test_library_and_kernel_are_the_reference(
    rows: int, columns: int, inner: int, scale: float, of_a: str, of_b: str, adds: bool, seed: int
) -> None:
    a, b = matrix(rows, inner, seed, scale, of_a), matrix(inner, columns, seed + 1, 1.0, of_b)
    out = matrix(rows, columns, seed + 2, scale, "inside") if adds else torch.full((rows, columns), torch.nan)
    by_kernel = out.clone()
    start = out.clone() if adds else torch.zeros(rows, columns)
    arithmetic = DefinedArithmetic()
    (arithmetic.add if adds else arithmetic.multiply)(a, b, out)
    defined_products._by_kernel(a, b, by_kernel, 1.0, adds=adds)
    np.testing.assert_array_equal(bits(out), bits(by_kernel))
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)):
        if inner <= 129:
            assert out[row, column].item() == reference(a, b, row, column, float(start[row, column]))


def test_a_row_has_the_same_bits_in_any_company() -> None:
    a, b = matrix(700, 200, 1, 1.0, "plain"), matrix(200, 48, 2, 1.0, "transposed")
    whole = torch.empty(700, 48)
    DefinedArithmetic().multiply(a, b, whole)
    for begin, end in ((0, 1), (17, 19), (100, 115), (3, 300), (699, 700)):
        part = torch.empty(end - begin, 48)
        DefinedArithmetic().multiply(a[begin:end], b, part)
        np.testing.assert_array_equal(bits(part), bits(whole[begin:end]))


def test_batches_are_the_products_of_each() -> None:
    random = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 40, 150, generator=random), torch.randn(4, 20, 150, generator=random).transpose(1, 2)
    for columns in (20, 2):
        out, alone = torch.empty(4, 40, columns), torch.empty(40, columns)
        DefinedArithmetic().multiply(a, b[..., :columns], out)
        for index in range(4):
            DefinedArithmetic().multiply(a[index], b[index][:, :columns], alone)
            np.testing.assert_array_equal(bits(out[index]), bits(alone))


def test_a_library_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = matrix(40, 100, 1, 1.0, "plain"), matrix(100, 32, 2, 1.0, "plain")
    expected, found = torch.empty(40, 32), torch.empty(40, 32)
    DefinedArithmetic().multiply(a, b, expected)

    def backwards(a: Tensor, b: Tensor, out: Tensor, factor: float, *, adds: bool) -> None:
        out.copy_(factor * (a.flip(-1) @ b.flip(-2)) + (out if adds else 0))

    monkeypatch.setattr(defined_products, "_by_parts", backwards)
    defined_products._library_meets.cache_clear()
    DefinedArithmetic().multiply(a, b, found)
    defined_products._library_meets.cache_clear()
    np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("columns", [24, 40, 72, 100])
def test_a_shape_has_the_same_bits_on_any_number_of_threads(columns: int) -> None:
    # MKL cuts such matrices in other places for four threads than for one or two.
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((1000, 24), (24, columns)))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 4, 2, 8, 3):
            torch.set_num_threads(threads)
            out = torch.empty(1000, columns)
            defined_products.product(a, b, out, 1.0, adds=False)
            found.append(out.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


@pytest.mark.parametrize("operation", [torch.addmm, torch.baddbmm])
def test_what_is_added_zero_times_is_not_read(operation: Callable[..., Tensor]) -> None:
    shape = (2, 20, 20) if operation is torch.baddbmm else (20, 20)
    a, b = torch.randn(shape), torch.randn(shape)
    with torch.no_grad(), operations_of_torch.OperationsOfTorch():
        found = operation(torch.full(shape, math.nan), a, b, beta=0, alpha=2)
    torch.testing.assert_close(found, 2 * (a @ b))


def test_modules_and_autograd_multiply_as_defined() -> None:
    random = torch.Generator().manual_seed(4)
    linear, x = nn.Linear(150, 3), torch.randn(20, 150, generator=random, requires_grad=True)
    arithmetic = DefinedArithmetic()
    with arithmetic.of_torch():
        out = linear(x)
        of_x, of_weight = torch.autograd.grad(out.square().sum(), [x, linear.weight])
    expected = linear.bias.detach().repeat(20, 1)
    arithmetic.add(x.detach(), linear.weight.detach().t(), expected)
    np.testing.assert_array_equal(bits(out), bits(expected))
    gradient = 2 * expected
    for found, a, b in ((of_x, gradient, linear.weight), (of_weight, gradient.t(), x)):
        product = torch.empty_like(found)
        arithmetic.multiply(a.detach(), b.detach(), product)
        np.testing.assert_array_equal(bits(found), bits(product))


def _emulated(typing_context: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        return defined_products._fma_by_float64(builder, *values)

    return types.float32(types.float32, types.float32, types.float32), generate


emulated: Any = intrinsic(_emulated)


@numba.njit(error_model="numpy")
def of_both(a: Any, b: Any, c: Any, found: Any, expected: Any) -> None:
    for index in range(len(a)):
        found[index] = emulated(a[index], b[index], c[index])
        expected[index] = defined_products.fma(a[index], b[index], c[index])


@pytest.mark.parametrize("kind", ["any bits", "near each other", "what a product loses", "subnormal"])
def test_a_multiply_add_of_float64_operations_is_the_processors(kind: str) -> None:
    random = np.random.default_rng(1)
    a, b, c = (random.normal(size=100_000).astype(np.float32) for _ in range(3))
    if kind == "any bits":
        a, b, c = (random.integers(0, 2**32, len(a), dtype=np.uint32).view(np.float32) for _ in range(3))
    elif kind == "what a product loses":
        c = -(a * b)
    elif kind == "subnormal":
        a, b, c = a * np.float32(1e-20), b * np.float32(1e-20), c * np.float32(1e-40)
    found, expected = np.empty_like(a), np.empty_like(a)
    of_both(a, b, c, found, expected)
    np.testing.assert_array_equal(found, expected)  # NaN for NaN: their other bits may be any
    either = ~np.isnan(expected)
    np.testing.assert_array_equal(found[either].view(np.int32), expected[either].view(np.int32))


@pytest.mark.parametrize("shape", [(6,), (6, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_evaluation_is_torchs_to_rounding(shape: tuple[int, ...], affine: bool) -> None:
    random = torch.Generator().manual_seed(6)
    norm = nn.BatchNorm1d(6, affine=affine)
    for _ in range(3):
        norm(torch.randn(20, *shape, generator=random) + 2)
    if affine:
        nn.init.normal_(norm.weight, generator=random)
        nn.init.normal_(norm.bias, generator=random)
    x = torch.randn(30, *shape, generator=random)
    norm.eval()
    with torch.no_grad(), DefinedArithmetic().of_torch():
        found = norm(x)
        alone = torch.cat([norm(row) for row in x.split(1)])
    torch.testing.assert_close(found, norm(x).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, alone)
    norm.train()
    with DefinedArithmetic().of_torch():
        torch.testing.assert_close(norm(x), copy.deepcopy(norm)(x))


def test_other_factors_and_other_types() -> None:
    random = torch.Generator().manual_seed(5)
    a, b, c = (torch.randn(20, 20, generator=random) for _ in range(3))
    with DefinedArithmetic().of_torch():
        torch.testing.assert_close(torch.addmm(c, a, b, beta=0.5, alpha=2.0), 0.5 * c + 2 * (a @ b))
        torch.testing.assert_close(torch.addcmul(c, a, b, value=0.5), c + 0.5 * a * b)
        np.testing.assert_array_equal(bits(torch.addcmul(c, a, b)), bits(a * b + c))
        wide = a.double() @ b.double()
    torch.testing.assert_close(wide, torch.from_numpy(a.double().numpy() @ b.double().numpy()))


def test_what_is_multiplied_can_be_freed_by_its_owner() -> None:
    a, b, out = torch.ones(3, 30), torch.ones(30, 20), torch.empty(3, 20)
    DefinedArithmetic().multiply(a, b, out)
    for numbers in (a, b):
        numbers.untyped_storage().resize_(0)


def test_a_pass_that_is_written_out_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(operations_of_torch, "product", lambda a, *_, **__: seen.append(a))
    a = torch.ones(3, 40)
    with DefinedArithmetic().of_torch():
        written_out(lambda: a @ a.t())()
        assert not seen
        a @ a.t()
        assert len(seen) == 1
