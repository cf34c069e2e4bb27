"""Whole optimizer steps of a small network as one compiled function: forward, loss, backward, clipping, AdamW.

At 32 rows a step's products take 0.15 ms, and what Python, autograd and torch's kernels need to start takes several
times as long. Here nothing starts but the products, which are torch's own, and what is between them is that of
`cpu_kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from dist_train.accel.blas import pointer, sgemm
from dist_train.accel.compiled import compiled, inlined
from dist_train.accel.cpu_kernels import (
    add_rows,
    affine_relu_dropout,
    batch_norm_backward_coefficients,
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_scale_shift,
    batch_norm_stats,
    relu_dropout_backward,
    update_running_stats,
)
from dist_train.accel.defined_steps import adamw, cross_entropy, sum_of_squares

Array = np.ndarray[Any, Any]

# A network of fully connected layers, for compiled code: `table[l]` has what layer `l` needs. Beyond the first four
# columns these are addresses of contiguous numbers, float32 but for float64 `TOTALS` and `INVERSE_STD` and int64
# `NUM_BATCHES`; 0: it has none. `SUMS` to `SCRATCH` are blocks of (rows, outputs), `STATISTICS` of (3, outputs),
# `TOTALS` of (2, outputs), all else has a number for each output, weights for each output and input.
(
    INPUTS, OUTPUTS, HAS_NORM, THRESHOLD, WEIGHT, BIAS, NORM_WEIGHT, NORM_BIAS, WEIGHT_GRADIENT, BIAS_GRADIENT,
    NORM_WEIGHT_GRADIENT, NORM_BIAS_GRADIENT, RUNNING_MEAN, RUNNING_VAR, NUM_BATCHES, SUMS, ACTIVATIONS, SCRATCH,
    SCALE, SHIFT, Z_COEF, CONST_COEF, TOTALS, STATISTICS, WHOLE, INVERSE_STD, ROWS, COLUMNS,
) = range(28)  # fmt: skip
INPUT_SCALE, EPS, MOMENTUM = range(3)
"""Columns of the numbers of a layer."""


@inlined
def _floats(address: int, rows: int, features: int) -> Array:
    return carray(pointer(address), (rows, features), np.float32)


@inlined
def _vector(address: int, size: int) -> Array:
    return carray(pointer(address), (size,), np.float32)


@inlined
def _doubles(address: int, rows: int, features: int) -> Array:
    return carray(pointer(address), (rows, features), np.float64)


@inlined
def _layer_forward(row: Array, numbers: Array, counter: int, rows: int) -> None:
    """From the sums of a hidden layer to what the next one reads: BatchNorm or the bias, ReLU, dropout."""
    features = row[OUTPUTS]
    sums = _floats(row[SUMS], rows, features)
    scale, shift = _vector(row[SCALE], features), _vector(row[SHIFT], features)
    if row[HAS_NORM]:
        statistics, whole = _doubles(row[STATISTICS], 3, features), _doubles(row[WHOLE], 3, features)
        for feature in range(features):
            statistics[0, feature] = rows
        batch_norm_stats(sums, statistics)
        batch_norm_scale_shift(
            carray(pointer(row[STATISTICS]), (1, 3, features), np.float64), whole, numbers[EPS],
            _vector(row[NORM_WEIGHT], features), _vector(row[NORM_BIAS], features),
            carray(pointer(row[INVERSE_STD]), (features,), np.float64), scale, shift,
        )  # fmt: skip
        if row[NUM_BATCHES]:
            batches = carray(pointer(row[NUM_BATCHES]), (1,), np.int64)
            batches[0] += 1
            share = numbers[MOMENTUM] if numbers[MOMENTUM] >= 0 else 1 / batches[0]
            mean, var = _vector(row[RUNNING_MEAN], features), _vector(row[RUNNING_VAR], features)
            update_running_stats(mean, var, whole, _vector(row[BIAS], features), share)
    else:
        shift = _vector(row[BIAS], features)
    affine_relu_dropout(sums, scale, shift, counter, row[THRESHOLD], _floats(row[ACTIVATIONS], rows, features))


@inlined
def _layer_backward(row: Array, rows: int) -> None:
    """From the gradient of what the next layer reads, in `SCRATCH`, to that of the sums, in `ACTIVATIONS`."""
    features = row[OUTPUTS]
    sums, activations = _floats(row[SUMS], rows, features), _floats(row[ACTIVATIONS], rows, features)
    totals = _doubles(row[TOTALS], 2, features)
    for feature in range(features):
        totals[0, feature] = totals[1, feature] = 0
    relu_dropout_backward(_floats(row[SCRATCH], rows, features), sums, activations, totals)
    bias, weight = row[BIAS_GRADIENT], 0
    if row[HAS_NORM]:
        bias, weight = row[NORM_BIAS_GRADIENT], row[NORM_WEIGHT_GRADIENT]
        mean = _doubles(row[WHOLE], 3, features)[1]
        inverse_std = carray(pointer(row[INVERSE_STD]), (features,), np.float64)
        three = carray(pointer(row[TOTALS]), (1, 2, features), np.float64)
        batch_norm_backward_reduce(three, mean, inverse_std)
        z_coef, const_coef = _vector(row[Z_COEF], features), _vector(row[CONST_COEF], features)
        batch_norm_backward_coefficients(
            totals, float(rows), mean, inverse_std, _vector(row[NORM_WEIGHT], features), z_coef, const_coef
        )
        batch_norm_backward_elemt(activations, sums, _vector(row[SCALE], features), z_coef, const_coef)
    if bias:
        _copy(totals, 0, _vector(bias, features))
    if weight:
        _copy(totals, 1, _vector(weight, features))


@inlined
def _copy(totals: Array, which: int, out: Array) -> None:
    for feature in range(len(out)):
        out[feature] = totals[which, feature]


@inlined
def _forward(table: Array, numbers: Array, counters: Array, rows: int, source: int) -> None:
    """Logits of a batch into the last layer's `SUMS`."""
    layers = len(table)
    for index in range(layers):
        row = table[index]
        inputs, outputs = np.int32(row[INPUTS]), np.int32(row[OUTPUTS])
        read = table[index - 1, ACTIVATIONS] if index else source
        beta = np.float32(0)
        if index == layers - 1 and row[BIAS]:
            beta = np.float32(1)
            logits, bias = _floats(row[SUMS], rows, row[OUTPUTS]), _vector(row[BIAS], row[OUTPUTS])
            for r in range(rows):
                for feature in range(len(bias)):
                    logits[r, feature] = bias[feature]
        sgemm(
            True, False, outputs, np.int32(rows), inputs, np.float32(numbers[index, INPUT_SCALE]),
            np.uintp(row[WEIGHT]), inputs, np.uintp(read), inputs, beta, np.uintp(row[SUMS]), outputs,
        )  # fmt: skip
        if index < layers - 1:
            _layer_forward(row, numbers[index], counters[index], rows)


@inlined
def _backward(table: Array, numbers: Array, rows: int, source: int) -> None:
    """Gradients of the parameters, from that of the logits in the last layer's `SUMS`."""
    gradient = table[-1, SUMS]
    for index in range(len(table) - 1, -1, -1):
        row = table[index]
        inputs, outputs = np.int32(row[INPUTS]), np.int32(row[OUTPUTS])
        scale = np.float32(numbers[index, INPUT_SCALE])
        read = table[index - 1, ACTIVATIONS] if index else source
        sgemm(
            False, True, inputs, outputs, np.int32(rows), scale, np.uintp(read), inputs, np.uintp(gradient), outputs,
            np.float32(0), np.uintp(row[WEIGHT_GRADIENT]), inputs,
        )  # fmt: skip
        if index:
            before = table[index - 1]
            sgemm(
                False, False, inputs, np.int32(rows), outputs, scale, np.uintp(row[WEIGHT]), inputs,
                np.uintp(gradient), outputs, np.float32(0), np.uintp(before[SCRATCH]), inputs,
            )  # fmt: skip
            _layer_backward(before, rows)
            gradient = before[ACTIVATIONS]


@compiled
def train_steps(
    table: Array, numbers: Array, counters: Array, lengths: Array, inputs: Array, targets: Array, class_weights: Array,
    smoothing: float, values: Array, gradient: Array, moments: Array, groups: Array, settings: Array, results: Array,
) -> int:  # fmt: skip
    """Optimizer steps on consecutive batches of `lengths` rows, to one without a finite loss; how many were taken.

    `counters`, (steps, layers), are where dropout's bits start; `inputs`, (rows, width), and `targets` hold all
    batches. `groups`, (groups, 3): where parameters with a weight decay of their own begin, end, and that decay.
    `settings`, (steps, 6): learning rate, beta 1, beta 2, epsilon, the number of the step, the largest norm of a
    gradient. Written into `results`, (steps, 5): 0 and 1 loss and weight, summed over the rows, 3 the norm of the
    gradient, 4 whether both were finite.
    """
    start = 0
    last = table[-1]
    no_weights = np.empty(0)
    for step in range(len(lengths)):
        rows = lengths[step]
        batch = _floats(last[ROWS], rows, inputs.shape[1])
        for r in range(rows):  # to where each batch is: where numbers begin may decide how a product rounds
            for column in range(inputs.shape[1]):
                batch[r, column] = inputs[start + r, column]
        _forward(table, numbers, counters[step], rows, last[ROWS])
        logits = _floats(last[SUMS], rows, last[OUTPUTS])
        cross_entropy(logits, targets[start : start + rows], class_weights, no_weights, 1, smoothing, results[step])
        if last[BIAS]:
            of_bias = _vector(last[BIAS_GRADIENT], last[OUTPUTS])
            for feature in range(len(of_bias)):
                of_bias[feature] = 0
            add_rows(of_bias, logits)
        _backward(table, numbers, rows, last[ROWS])
        factor = 1 / results[step, 1]
        norm = np.sqrt(sum_of_squares(gradient)) * factor
        results[step, 3] = norm
        if not np.isfinite(results[step, 0] + norm):
            return step
        results[step, 4] = 1
        factor *= min(1.0, settings[step, 5] / (norm + 1e-6))
        for group in range(len(groups)):
            first, end = int(groups[group, 0]), int(groups[group, 1])
            adamw(
                values[first:end], gradient[first:end], moments[0, first:end], moments[1, first:end], factor,
                groups[group, 2], settings[step],
            )  # fmt: skip
        start += rows
    return len(lengths)
