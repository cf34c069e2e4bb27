"""Exponential function, logarithm, cosine and softmax, against decimal numbers of forty digits and against torch."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.accel.defined_arithmetic import DefinedArithmetic
from dist_train.accel.defined_functions import cosine_of_turns, exp, log, power, softmax
from dist_train.determinism.arithmetic import Arithmetic

getcontext().prec = 40
class_probabilities = DefinedArithmetic().probabilities


def units(found: float, exact: Decimal) -> float:
    """How far a number is from the exact one, in units of the last place of the latter."""
    return float(abs(Decimal(found) - exact) / Decimal(float(np.spacing(abs(float(exact))))))


@settings(max_examples=500, deadline=None)
@given(st.floats(-744.0, 709.0))
def test_the_exponential_is_within_one_unit_in_the_last_place(number: float) -> None:
    assert units(float(exp(np.array(number))), Decimal(number).exp()) <= 1


@settings(max_examples=500, deadline=None)
@given(st.floats(5e-324, 1.7e308) | st.floats(0.5, 2.0))
def test_the_logarithm_is_within_one_unit_in_the_last_place(number: float) -> None:
    exact = Decimal(number).ln()
    assert exact == 0 or units(float(log(np.array(number))), exact) <= 1


def exact_cosine(turns: float) -> Decimal:
    """Of the Taylor series."""
    angle = 2 * Decimal("3.141592653589793238462643383279502884197169399375105820974944592") * (Decimal(turns) % 1)
    total = term = Decimal(1)
    for n in range(2, 120, 2):
        term *= -angle * angle / (n * (n - 1))
        total += term
    return total


@settings(max_examples=300, deadline=None)
@given(st.floats(0.0, 1.0) | st.floats(-3.0, 40.0))
def test_the_cosine_is_within_two_units_of_the_last_place_of_one(turns: float) -> None:
    assert abs(Decimal(cosine_of_turns(turns)) - exact_cosine(turns)) <= Decimal(2) ** -51


def test_cosines_of_quarters() -> None:
    assert [cosine_of_turns(n / 4) for n in range(-4, 5)] == [1, 0, -1, 0, 1, 0, -1, 0, 1]


@settings(deadline=None)
@given(st.floats(0.1, 1.0), st.integers(0, 300))
def test_a_power_is_exact_to_one_rounding_a_factor(base: float, exponent: int) -> None:
    exact = Fraction(base) ** exponent
    assert abs(Fraction(power(base, exponent)) - exact) <= exact * exponent * Fraction(2) ** -53


def test_their_ends() -> None:
    found = exp(np.array([-math.inf, -746.0, 0.0, 710.0, math.inf, math.nan]))
    np.testing.assert_array_equal(found, [0, 0, 1, math.inf, math.inf, math.nan])
    np.testing.assert_array_equal(log(np.array([0.0, 1.0, math.inf])), [-math.inf, 0, math.inf])
    assert np.isnan(log(np.array([-1.0, math.nan]))).all()


# Whole bits of some numbers: what every processor has. Of the formulas in plain Python numbers, which round as they do.
BITS = {
    cosine_of_turns: {0.1: "0x1.9e3779b97f4a8p-1", 0.3: "-0x1.3c6ef372fe94ep-2", 0.9: "0x1.9e3779b97f4a8p-1"},
    exp: {0.1: "0x1.1aec7b35a00d4p+0", -1.0: "0x1.78b56362cef38p-2", -20.5: "0x1.57a3afeed00abp-30"},
    log: {0.1: "-0x1.26bb1bbb55515p+1", 3.0: "0x1.193ea7aad030ap+0", 0.75: "-0x1.269621134db92p-2"},
}


@pytest.mark.parametrize("function", BITS, ids=lambda one: one.__name__)
def test_bits_that_every_processor_has(function: object) -> None:
    for number, bits in BITS[function].items():  # type: ignore[index]
        assert float(function(number)).hex() == bits  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(50, 1), (50, 2), (50, 7), (20, 4, 3)])
def test_softmax_is_torchs_to_rounding_and_each_row_is_its_own(shape: tuple[int, ...]) -> None:
    logits = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = torch.from_numpy(softmax(logits.numpy()))
    torch.testing.assert_close(found, logits.double().softmax(-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(class_probabilities(logits), Arithmetic().probabilities(logits), rtol=1e-14, atol=0)
    for row in range(0, len(logits), 7):
        assert torch.equal(class_probabilities(logits[row : row + 1])[0], class_probabilities(logits)[row])


def test_a_row_that_is_not_finite_stays_so() -> None:
    logits = torch.tensor([[0.0, math.nan], [math.inf, 1.0], [1.0, 2.0]])
    assert class_probabilities(logits).isfinite().all(1).tolist() == [False, False, True]
