"""What a fused network does between its matrix products, compiled: one pass over a block of rows each.

Blocks, (rows, features), are float32 or float64, factors of features, (features,), of the same type, statistics and
totals float64. No two arguments of a function may share memory: it would work, but without vector instructions. Each
number that is left in a block depends on its row and the factors alone, in the same operations, whichever rows are
beside it; sums go from the first row to the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_train.accel.compiled import compiled
from dist_train.determinism import keyed_random

Array = np.ndarray[Any, Any]

_INCREMENT = np.uint64(keyed_random.INCREMENT)
(_SHIFT1, _MULTIPLIER1), (_SHIFT2, _MULTIPLIER2) = ((np.uint64(s), np.uint64(m)) for s, m in keyed_random.ROUNDS)
_SHIFT3 = np.uint64(keyed_random.LAST_SHIFT)


@compiled
def batch_norm_stats(block: Array, statistics: Array) -> None:
    """Mean and variance of each feature, into rows 1 and 2 of (3, features). Of no rows: nothing.

    In one pass, over what the rows differ by from the first (Chan, Golub and LeVeque 1983), four of them at a time.
    """
    rows, features = block.shape
    if rows == 0:
        return
    first = block[0].astype(np.float64)
    sums, squares = np.zeros(features), np.zeros(features)
    for row in range(0, rows - 3, 4):
        for feature in range(features):
            origin = first[feature]
            a, b = block[row, feature] - origin, block[row + 1, feature] - origin
            c, d = block[row + 2, feature] - origin, block[row + 3, feature] - origin
            sums[feature] = sums[feature] + a + b + c + d
            squares[feature] = squares[feature] + a * a + b * b + c * c + d * d
    for row in range(rows - rows % 4, rows):
        for feature in range(features):
            apart = block[row, feature] - first[feature]
            sums[feature] += apart
            squares[feature] += apart * apart
    for feature in range(features):
        shift = sums[feature] / rows
        statistics[1, feature] = first[feature] + shift
        statistics[2, feature] = max(squares[feature] / rows - shift * shift, 0.0)


@compiled
def batch_norm_gather_stats(parts: Array, whole: Array) -> None:
    """Count, mean and variance of all rows from those of their parts, in order: (parts, 3, features) -> (3, features).

    Chan, Golub and LeVeque (1983, "Algorithms for computing the sample variance").
    """
    whole[:] = 0
    num_parts, _, features = parts.shape
    for part in range(num_parts):
        for feature in range(features):
            whole[0, feature] += parts[part, 0, feature]
            whole[1, feature] += parts[part, 0, feature] * parts[part, 1, feature]
    for feature in range(features):
        whole[1, feature] /= max(whole[0, feature], 1.0)  # no rows at all: zeros
    for part in range(num_parts):
        for feature in range(features):
            apart = parts[part, 1, feature] - whole[1, feature]
            whole[2, feature] += parts[part, 0, feature] * (parts[part, 2, feature] + apart * apart)
    for feature in range(features):
        whole[2, feature] /= max(whole[0, feature], 1.0)


@compiled
def batch_norm_scale_shift(
    parts: Array, whole: Array, eps: float, weight: Array, bias: Array, inverse_std: Array, scale: Array, shift: Array
) -> float:
    """What BatchNorm multiplies and adds: scale = weight / sqrt(var + eps), shift = bias - mean * scale.

    Mean and variance are those of `batch_norm_gather_stats`; their count comes back.
    """
    batch_norm_gather_stats(parts, whole)
    mean, var = whole[1], whole[2]
    for feature in range(len(mean)):
        inverse_std[feature] = 1 / np.sqrt(var[feature] + eps)
        wide = inverse_std[feature] * weight[feature]
        scale[feature] = wide
        shift[feature] = bias[feature] - mean[feature] * wide
    return float(whole[0, 0])


@compiled
def update_running_stats(running_mean: Array, running_var: Array, whole: Array, offset: Array, share: float) -> None:
    """Move the running statistics by `share` towards `whole`, (3, features): mean + offset, unbiased variance."""
    for feature in range(len(running_mean)):
        unbiased = whole[2, feature] * (whole[0, feature] / (whole[0, feature] - 1))
        running_mean[feature] += (whole[1, feature] + offset[feature] - running_mean[feature]) * share
        running_var[feature] += (unbiased - running_var[feature]) * share


@compiled
def affine_relu_dropout(block: Array, scale: Array, shift: Array, start: int, threshold: int, out: Array) -> None:
    """block * scale + shift through ReLU and dropout; what is kept is not scaled.

    Dropped is what has bits below `threshold`; the bits of all rows follow from `start` (`RowRandom.counter_for`).
    """
    rows, features = block.shape
    none = block.dtype.type(0)
    words = np.empty((features + 3) // 4, np.uint64)
    bits = words.view(np.int16)
    offsets = np.arange(len(words)).astype(np.uint64) * _INCREMENT
    counter = np.uint64(start)
    lowest = np.int16(threshold)
    for row in range(rows):
        for word in range(len(words)):
            mixed = counter + offsets[word]
            mixed = (mixed ^ (mixed >> _SHIFT1)) * _MULTIPLIER1
            mixed = (mixed ^ (mixed >> _SHIFT2)) * _MULTIPLIER2
            words[word] = mixed ^ (mixed >> _SHIFT3)
        counter += np.uint64(len(words)) * _INCREMENT
        for feature in range(features):
            value = block[row, feature] * scale[feature] + shift[feature]
            value = none if value <= 0 else value  # NaN stays
            out[row, feature] = value if bits[feature] >= lowest else none


@compiled
def relu_dropout_backward(gradient: Array, sums: Array, activations: Array, totals: Array) -> None:
    """Gradient through ReLU and dropout, written over `activations`: `gradient` where it was above 0, else 0.

    Adds it up over the rows in (2, features), and its product with `sums`, what ReLU's input was made of.
    """
    rows, features = sums.shape
    none = sums.dtype.type(0)
    for row in range(rows):
        for feature in range(features):
            kept = gradient[row, feature]
            kept = kept if activations[row, feature] > 0 else none
            activations[row, feature] = kept
            totals[0, feature] += kept
            totals[1, feature] += np.float64(kept) * sums[row, feature]


@compiled
def add(gradient: Array, totals: Array) -> None:
    """gradient + totals, in place: both (features,)."""
    for feature in range(len(gradient)):
        gradient[feature] += totals[feature]


@compiled
def add_rows(gradient: Array, rows: Array) -> None:
    """gradient + the sum of all rows, in place: (features,) and (rows, features)."""
    totals = np.zeros(len(gradient))
    for row in range(len(rows)):
        for feature in range(len(totals)):
            totals[feature] += rows[row, feature]
    for feature in range(len(totals)):
        gradient[feature] += totals[feature]


@compiled
def batch_norm_backward_reduce(totals: Array, mean: Array, inverse_std: Array) -> None:
    """From the totals of gradient * sum to those of gradient * normalised sum, in place: (slices, 2, features)."""
    for index in range(len(totals)):
        for feature in range(len(mean)):
            product = totals[index, 1, feature] - totals[index, 0, feature] * mean[feature]
            totals[index, 1, feature] = product * inverse_std[feature]


@compiled
def batch_norm_backward_coefficients(
    totals: Array, count: float, mean: Array, inverse_std: Array, weight: Array, z_coef: Array, const_coef: Array
) -> None:
    """Coefficients of the input gradient that come from BatchNorm's mean and variance, from the totals over all slices.

    Ioffe and Szegedy (2015, "Batch normalization"), sorted by what multiplies a sum and what does not.
    """
    for feature in range(len(mean)):
        factor = inverse_std[feature] * weight[feature] / -count
        multiplier = totals[1, feature] * factor * inverse_std[feature]
        z_coef[feature] = multiplier
        const_coef[feature] = totals[0, feature] * factor - multiplier * mean[feature]


@compiled
def batch_norm_backward_elemt(gradient: Array, sums: Array, scale: Array, z_coef: Array, const_coef: Array) -> None:
    """gradient * scale + sums * of_sum + constant, in place."""
    rows, features = sums.shape
    for row in range(rows):
        for feature in range(features):
            gradient[row, feature] = (
                gradient[row, feature] * scale[feature] + sums[row, feature] * z_coef[feature] + const_coef[feature]
            )
