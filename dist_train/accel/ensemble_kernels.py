"""What a fused ensemble does between its matrix products, compiled; see `cpu_kernels.py` for the conventions.

Activations of the first hidden layer are (rows, members * units), those of later ones (members, rows, units): so each
product reads and writes memory as its kernel wants it. The bits of dropout are those of (rows, members * units).
"""

from __future__ import annotations

import numpy as np

from dist_train.accel.compiled import compiled
from dist_train.accel.cpu_kernels import (
    _INCREMENT,
    _MULTIPLIER1,
    _MULTIPLIER2,
    _SHIFT1,
    _SHIFT2,
    _SHIFT3,
    Array,
    add_rows,
)
from dist_train.determinism.dropout import NOTHING_DROPPED

_KEEPS_ALL = NOTHING_DROPPED


@compiled
def _fill_bits(words: Array, counter: np.uint64) -> None:
    """SplitMix64 of the counters from `counter` on."""
    for word in range(len(words)):
        mixed = counter + np.uint64(word) * _INCREMENT
        mixed = (mixed ^ (mixed >> _SHIFT1)) * _MULTIPLIER1
        mixed = (mixed ^ (mixed >> _SHIFT2)) * _MULTIPLIER2
        words[word] = mixed ^ (mixed >> _SHIFT3)


@compiled
def bias_relu_dropout(block: Array, bias: Array, start: int, threshold: int) -> None:
    """block + bias through ReLU and dropout, in place: (rows, features). What is kept is not scaled."""
    rows, features = block.shape
    none = block.dtype.type(0)
    words = np.zeros((features + 3) // 4, np.uint64)
    bits = words.view(np.int16)
    counter = np.uint64(start)
    lowest = np.int16(threshold)
    for row in range(rows):
        if threshold != _KEEPS_ALL:
            _fill_bits(words, counter)
            counter += np.uint64(len(words)) * _INCREMENT
        for feature in range(features):
            value = block[row, feature] + bias[feature]
            value = none if value <= 0 else value  # NaN stays
            block[row, feature] = value if bits[feature] >= lowest else none


@compiled
def bias_relu_dropout_of_members(block: Array, bias: Array, start: int, threshold: int) -> None:
    """The same for (members, rows, units), with a bias (members, units)."""
    members, rows, units = block.shape
    none = block.dtype.type(0)
    lowest = np.int16(threshold)
    words_of_row = (members * units + 3) // 4
    for member in range(members):
        first = (member * units) // 4
        offset = member * units - 4 * first
        words = np.zeros((member * units + units + 3) // 4 - first, np.uint64)
        bits = words.view(np.int16)[offset:]
        counter = np.uint64(start) + np.uint64(first) * _INCREMENT
        for row in range(rows):
            if threshold != _KEEPS_ALL:
                _fill_bits(words, counter)
                counter += np.uint64(words_of_row) * _INCREMENT
            for unit in range(units):
                value = block[member, row, unit] + bias[member, unit]
                value = none if value <= 0 else value
                block[member, row, unit] = value if bits[unit] >= lowest else none


@compiled
def relu_dropout_backward_of_members(gradient: Array, activations: Array, rows_first: bool, totals: Array) -> None:
    """Gradient (members, rows, units) where `activations` are above 0, else 0: written over the latter.

    They are (rows, members, units) where `rows_first`, else (members, rows, units). Adds the gradient up over the rows
    in `totals`, (members, units).
    """
    members, rows, units = gradient.shape
    none = gradient.dtype.type(0)
    for member in range(members):
        for row in range(rows):
            # Of either layout, units side by side, which the compiler sees: a transposed view takes ten times as long.
            of_row = activations[row, member] if rows_first else activations[member, row]
            for unit in range(units):
                kept = gradient[member, row, unit] if of_row[unit] > 0 else none
                of_row[unit] = kept
                totals[member, unit] += kept


@compiled
def add_rows_of_members(gradient: Array, rows: Array) -> None:
    """gradient + the sum of all rows of each member, in place: (members, classes) and (members, rows, classes)."""
    for member in range(len(gradient)):
        add_rows(gradient[member], rows[member])


@compiled
def weights_of_members(weight: Array, inputs: Array, outputs: Array, scale: float, out: Array) -> None:
    """What each member multiplies by: weight (out, in) times its factors of inputs, (members, in), and of outputs."""
    members, num_outputs, num_inputs = out.shape
    for member in range(members):
        for o in range(num_outputs):
            factor = out.dtype.type(outputs[member, o] * scale)
            for i in range(num_inputs):
                out[member, o, i] = weight[o, i] * inputs[member, i] * factor


@compiled
def weights_of_members_backward(
    gradient: Array, weight: Array, inputs: Array, outputs: Array, scale: float,
    of_weight: Array, of_inputs: Array, of_outputs: Array,
) -> None:  # fmt: skip
    """From the gradient of what members multiply by to those of what it is made of, which begin as zeros."""
    members, num_outputs, num_inputs = gradient.shape
    products = np.zeros(num_inputs, gradient.dtype)
    for member in range(members):
        for o in range(num_outputs):
            factor = gradient.dtype.type(outputs[member, o] * scale)
            for i in range(num_inputs):
                scaled = gradient[member, o, i] * factor
                of_weight[o, i] += scaled * inputs[member, i]
                of_inputs[member, i] += scaled * weight[o, i]
                products[i] = gradient[member, o, i] * weight[o, i] * inputs[member, i]
            of_outputs[member, o] = _sum(products) * scale


@compiled
def _sum(numbers: Array) -> float:
    """The sum as eight sums side by side: one alone would wait for each of its additions."""
    a, b, c, d, e, f, g, h = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    whole = len(numbers) - len(numbers) % 8
    for i in range(0, whole, 8):
        a += numbers[i]
        b += numbers[i + 1]
        c += numbers[i + 2]
        d += numbers[i + 3]
        e += numbers[i + 4]
        f += numbers[i + 5]
        g += numbers[i + 6]
        h += numbers[i + 7]
    for i in range(whole, len(numbers)):
        a += numbers[i]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))
