"""Exponential, logarithm, cosine, powers and softmax whose every bit is defined: sums, products, quotients of float64.

A library's have other last bits on another processor: numpy's by its instructions, the C library's by its version. The
formulas and their constants are those of FreeBSD's msun (e_exp.c, e_log.c, k_sin.c and k_cos.c, Sun Microsystems 1993),
with errors of one unit in the last place at most. Compiled code does their operations one by one, on every processor.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dist_train.accel.compiled import compiled, inlined

Array = np.ndarray[Any, Any]

# The logarithm of 2 in two parts: a product of the first one with a whole number below 2**20 is exact.
_LN2, _LN2_REST = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_TURN = 6.28318530717958647693
_ONE_BY_LN2 = 1.44269504088896338700e00
_P1, _P2, _P3 = 1.66666666666666019037e-01, -2.77777777770155933842e-03, 6.61375632143793436117e-05
_P4, _P5 = -1.65339022054652515390e-06, 4.13813679705723846039e-08
_L1, _L2, _L3 = 6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01
_L4, _L5, _L6 = 2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01
_L7 = 1.479819860511658591e-01
_S1, _S2, _S3 = -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04
_S4, _S5, _S6 = 2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10
_C1, _C2, _C3 = 4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05
_C4, _C5, _C6 = -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11
_ROOT_OF_HALF = 0.70710678118654752440
# Below the first one the exponential is 0, above the second one it is infinite.
_NOTHING, _INFINITE = -745.13321910194122, 709.78271289338397


@inlined
def exp_of(x: float) -> float:
    """The exponential of a number; of NaN it is NaN."""
    if x < _NOTHING:
        return 0.0
    if x > _INFINITE:
        return math.inf
    if math.isnan(x):
        return x
    power = np.rint(x * _ONE_BY_LN2)
    high, low = x - power * _LN2, power * _LN2_REST
    rest = high - low
    square = rest * rest
    odd = rest - square * (_P1 + square * (_P2 + square * (_P3 + square * (_P4 + square * _P5))))
    return math.ldexp(1.0 - ((low - rest * odd / (2.0 - odd)) - high), int(power))


@inlined
def log_of(x: float) -> float:
    """The natural logarithm of a number; of 0 it is -inf, of a negative number and of NaN it is NaN."""
    if x <= 0 or math.isnan(x) or math.isinf(x):
        return x if x > 0 else -math.inf if x == 0 else math.nan
    mantissa, exponent = math.frexp(x)
    power = float(exponent)
    if mantissa < _ROOT_OF_HALF:
        mantissa *= 2.0
        power -= 1.0
    rest = mantissa - 1.0
    half = 0.5 * rest * rest
    share = rest / (2.0 + rest)
    square = share * share
    fourth = square * square
    even = square * (_L1 + fourth * (_L3 + fourth * (_L5 + fourth * _L7)))
    odd = fourth * (_L2 + fourth * (_L4 + fourth * _L6))
    return power * _LN2 - ((half - (share * (half + (odd + even)) + power * _LN2_REST)) - rest)


@inlined
def cos_of_turns(turns: float) -> float:
    """The cosine of so many whole turns: cos(2 pi turns); which part of a turn is left is found without rounding."""
    part = float(turns - np.floor(turns))
    quarters = float(np.rint(4.0 * part))
    x = (part - 0.25 * quarters) * _TURN
    square = x * x
    if int(quarters) % 2:
        odd = _S2 + square * (_S3 + square * (_S4 + square * (_S5 + square * _S6)))
        found = x + x * square * (_S1 + square * odd)
        return -found if quarters == 1 else found
    half = 0.5 * square
    even = square * (_C1 + square * (_C2 + square * (_C3 + square * (_C4 + square * (_C5 + square * _C6)))))
    whole = 1.0 - half
    found = whole + (((1.0 - whole) - half) + square * even)
    return -found if quarters == 2 else found


@inlined
def power_of(base: float, exponent: int) -> float:
    """The base to the power of a whole number that is not negative, by squares."""
    power = 1.0
    while exponent > 0:
        if exponent % 2:
            power *= base
        base *= base
        exponent //= 2
    return power


@compiled
def cosine_of_turns(turns: float) -> float:
    """`cos_of_turns`, to be called from Python."""
    return cos_of_turns(turns)


@compiled
def power(base: float, exponent: int) -> float:
    """`power_of`, to be called from Python."""
    return power_of(base, exponent)


@compiled
def _exp(numbers: Array, out: Array) -> None:
    for place in range(len(numbers)):
        out[place] = exp_of(numbers[place])


@compiled
def _log(numbers: Array, out: Array) -> None:
    for place in range(len(numbers)):
        out[place] = log_of(numbers[place])


@compiled
def _softmax(rows: Array, out: Array) -> None:
    for row in range(len(rows)):
        highest = rows[row, 0]
        for column in range(1, rows.shape[1]):
            highest = max(highest, rows[row, column])
        total = 0.0
        for column in range(rows.shape[1]):
            out[row, column] = exp_of(rows[row, column] - highest)
            total += out[row, column]
        for column in range(rows.shape[1]):
            out[row, column] /= total


def exp(numbers: Array) -> Array:
    """Of each number, float64."""
    flat = np.ascontiguousarray(numbers, np.float64).reshape(-1)
    out = np.empty_like(flat)
    _exp(flat, out)
    return out.reshape(np.shape(numbers))


def log(numbers: Array) -> Array:
    """Of each number, float64."""
    flat = np.ascontiguousarray(numbers, np.float64).reshape(-1)
    out = np.empty_like(flat)
    _log(flat, out)
    return out.reshape(np.shape(numbers))


def softmax(logits: Array) -> Array:
    """Over the last axis: exp(x - largest), divided by their sum in the order of the classes. float64."""
    rows = np.ascontiguousarray(logits, np.float64).reshape(-1, logits.shape[-1])
    out = np.empty_like(rows)
    _softmax(rows, out)
    return out.reshape(logits.shape)
