"""What a step does beside its passes, compiled: loss, norm of the gradient, AdamW, moving average.

Operations are done one by one in the order of the source, so their bits are the same on every processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_train.accel.compiled import compiled
from dist_train.accel.defined_functions import exp_of, log_of, power_of

Array = np.ndarray[Any, Any]


@compiled
def cross_entropy(
    logits: Array,
    targets: Array,
    class_weights: Array,
    row_weights: Array,
    members: int,
    smoothing: float,
    totals: Array,
) -> None:
    """Sums of loss and weight over the rows into `totals`, (2,); logits become the gradient of the loss.

    Logits are (rows * members, classes): the members of a row follow each other, and its loss is the mean over them.
    That of a member is -sum(q * log softmax), q = (1 - smoothing) * weight * one-hot + smoothing * weights / classes,
    times the weight of the row, float64; without any `row_weights` each row counts 1.
    """
    classes = logits.shape[1]
    spread = smoothing / classes
    loss, weight = 0.0, 0.0
    powers = np.empty(classes)
    for place in range(len(logits)):
        row, member = place // members, place % members
        target = targets[row]
        of_row = row_weights[row] if len(row_weights) else 1.0
        if member == 0:
            weight += of_row * class_weights[target]
        if members > 1:
            of_row /= members
        highest = np.float64(logits[place, 0])
        for c in range(1, classes):
            highest = max(highest, np.float64(logits[place, c]))
        norm = 0.0
        for c in range(classes):
            powers[c] = exp_of(logits[place, c] - highest)
            norm += powers[c]
        log_norm = log_of(norm) + highest
        whole = 0.0
        for c in range(classes):
            share = spread * class_weights[c] + ((1 - smoothing) * class_weights[c] if c == target else 0.0)
            whole += share
            loss += of_row * (share * (log_norm - logits[place, c]))
        for c in range(classes):
            share = spread * class_weights[c] + ((1 - smoothing) * class_weights[c] if c == target else 0.0)
            logits[place, c] = of_row * (powers[c] / norm * whole - share)
    totals[0], totals[1] = loss, weight


@compiled
def sum_of_squares(numbers: Array) -> float:
    """Of flat numbers, in float64, in 32 sums side by side."""
    lanes = np.zeros(32)
    for start in range(0, len(numbers) - 31, 32):
        for lane in range(32):
            wide = np.float64(numbers[start + lane])
            lanes[lane] += wide * wide
    for index in range(len(numbers) - len(numbers) % 32, len(numbers)):
        lanes[0] += np.float64(numbers[index]) * np.float64(numbers[index])
    total = 0.0
    for lane in range(32):
        total += lanes[lane]
    return total


def norm(numbers: Array) -> float:
    """Euclidean norm of flat numbers."""
    return float(np.sqrt(sum_of_squares(numbers)))


def adamw_settings(lr: float, betas: tuple[float, float], eps: float, step: int) -> Array:
    """The `settings` of `adamw`."""
    return np.array([lr, *betas, eps, step])


@compiled
def adamw(
    values: Array, gradient: Array, mean: Array, square: Array, factor: float, decay: float, settings: Array
) -> None:
    """A step of AdamW by gradient * factor, all of them (size,). Loshchilov and Hutter (2019).

    `settings`: learning rate, beta 1, beta 2, epsilon, the number of the step, counted from 1.
    """
    lr, beta1, beta2, eps, step = settings[0], settings[1], settings[2], settings[3], settings[4]
    one, count = values.dtype.type, int(step)
    keep, size = one(1 - lr * decay), one(lr / (1 - power_of(beta1, count)))
    correction = one(1 / np.sqrt(1 - power_of(beta2, count)))
    new1, old2, new2, tiny, scale = one(1 - beta1), one(beta2), one(1 - beta2), one(eps), one(factor)
    for index in range(len(values)):
        g = gradient[index] * scale
        m = mean[index] + new1 * (g - mean[index])
        s = square[index] * old2 + new2 * g * g
        mean[index], square[index] = m, s
        values[index] = values[index] * keep - size * m / (np.sqrt(s) * correction + tiny)


@compiled
def follow(average: Array, weights: Array, share: float) -> None:
    """average += share * (weights - average), in place: (size,); a share of 1 copies the weights."""
    part = average.dtype.type(share)
    for index in range(len(average)):
        if share == 1:
            average[index] = weights[index]
        else:
            average[index] += part * (weights[index] - average[index])
