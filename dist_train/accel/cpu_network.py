"""A small network that takes whole optimizer steps in compiled code: what `cpu_steps` reads and writes, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.accel import cpu_steps as steps
from dist_train.accel.blas import AVAILABLE
from dist_train.accel.cpu_layers import BLOCK_ROWS, Layer
from dist_train.accel.cpu_mlp import FusedSequential
from dist_train.determinism.batch_context import BatchContext
from dist_train.determinism.dropout import NOTHING_DROPPED

MAX_ROWS = BLOCK_ROWS
"""Rows of a batch: more would not stay in a core's cache, and the start of kernels takes little of their time."""
MAX_PARAMETERS = 1 << 20


class Updates(NamedTuple):
    """What AdamW works on: flat float32 parameters and gradients, (size,), moments, (2, size).

    `groups`: where parameters with a weight decay of their own begin, end, and that decay.
    """

    values: Tensor
    gradients: Tensor
    moments: Tensor
    groups: Sequence[tuple[int, int, float]]


class CompiledNetwork:
    """A fused sequence of layers, its loss and its optimizer.

    `gradient_of` gives the part of the flat gradients that belongs to a parameter; `class_weights`, (classes,) float32.
    """

    def __init__(
        self,
        sequence: FusedSequential,
        updates: Updates,
        gradient_of: Callable[[nn.Parameter], Tensor],
        class_weights: Tensor,
        label_smoothing: float,
    ) -> None:
        self._sequence = sequence
        self._gradient_of = gradient_of
        self._memory: list[Tensor] = []
        self._first_weight = sequence.layers[0].linear.weight
        self._address = self._first_weight.data_ptr()
        self._table = np.zeros((len(sequence.layers), steps.COLUMNS), np.int64)
        self._numbers = np.zeros((len(sequence.layers), 3))
        for row, numbers, layer in zip(self._table, self._numbers, sequence.layers, strict=True):
            self._describe(row, numbers, layer)
        self._table[-1, steps.ROWS] = self._floats(MAX_ROWS * sequence.layers[0].linear.in_features)
        self._loss = class_weights.numpy(), label_smoothing
        self._updates = [updates.values.numpy(), updates.gradients.numpy(), updates.moments.numpy()]
        self._updates.append(np.array(updates.groups, dtype=np.float64))

    @property
    def ready(self) -> bool:
        """Whether the network is in training, and its parameters are where they were."""
        return self._sequence.training and self._first_weight.data_ptr() == self._address

    def take(
        self, inputs: Tensor, targets: Tensor, batches: Sequence[BatchContext], settings: Any, results: Tensor
    ) -> int:
        """Optimizer steps on consecutive batches, as `cpu_steps.train_steps` says; how many were taken.

        `inputs`, (rows, width) float32, and `targets`, (rows,) int64, of all batches; `results`, (steps, 5) float64.
        """
        counters = np.array([self._counters(batch) for batch in batches], np.int64)
        lengths = np.array([batch.slices[0] for batch in batches], np.int64)
        taken: int = cast(Any, steps.train_steps)(
            self._table, self._numbers, counters, lengths, inputs.numpy(), targets.numpy(), *self._loss,
            *self._updates, settings, results.numpy(),
        )  # fmt: skip
        return taken

    def _counters(self, batch: BatchContext) -> list[int]:
        """Where the bits of each layer's dropout begin."""
        random, first = self._sequence.context.random, batch.first_row + batch.offset
        return [
            random.counter(layer.dropout.purpose, layer.linear.out_features, batch.epoch, first) if layer.dropout else 0
            for layer in self._sequence.layers
        ]

    def _describe(self, row: Any, numbers: Any, layer: Layer) -> None:
        linear, norm, features = layer.linear, layer.norm, layer.linear.out_features
        row[steps.INPUTS], row[steps.OUTPUTS], row[steps.HAS_NORM] = linear.in_features, features, norm is not None
        row[steps.THRESHOLD] = layer.dropout.threshold if layer.dropout else NOTHING_DROPPED
        numbers[steps.INPUT_SCALE] = layer.input_scale
        self._place(row, linear.weight, steps.WEIGHT, steps.WEIGHT_GRADIENT)
        self._place(row, linear.bias, steps.BIAS, steps.BIAS_GRADIENT)
        if linear.bias is None and layer is not self._sequence.layers[-1]:
            row[steps.BIAS] = self._floats(features)
        if norm is not None:
            row[steps.NORM_WEIGHT], row[steps.NORM_BIAS] = self._floats(features, 1.0), self._floats(features)
            self._place(row, norm.weight, steps.NORM_WEIGHT, steps.NORM_WEIGHT_GRADIENT)
            self._place(row, norm.bias, steps.NORM_BIAS, steps.NORM_BIAS_GRADIENT)
            numbers[steps.EPS], numbers[steps.MOMENTUM] = norm.eps, -1.0 if norm.momentum is None else norm.momentum
            if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
                row[steps.RUNNING_MEAN], row[steps.RUNNING_VAR] = (
                    norm.running_mean.data_ptr(),
                    norm.running_var.data_ptr(),
                )
                row[steps.NUM_BATCHES] = norm.num_batches_tracked.data_ptr()
        for column in (steps.SUMS, steps.ACTIVATIONS, steps.SCRATCH):
            row[column] = self._floats(MAX_ROWS * features)
        for column in (steps.SCALE, steps.SHIFT, steps.Z_COEF, steps.CONST_COEF):
            row[column] = self._floats(features, 1.0 if column == steps.SCALE else 0.0)
        for column, count in ((steps.TOTALS, 2), (steps.STATISTICS, 3), (steps.WHOLE, 3), (steps.INVERSE_STD, 1)):
            row[column] = self._address_of(torch.zeros(count * features, dtype=torch.float64))

    def _place(self, row: Any, parameter: Tensor | None, column: int, gradient: int) -> None:
        if isinstance(parameter, nn.Parameter):
            row[column], row[gradient] = parameter.data_ptr(), self._gradient_of(parameter).data_ptr()

    def _floats(self, count: int, value: float = 0.0) -> int:
        return self._address_of(torch.full((count,), value, dtype=torch.float32))

    def _address_of(self, memory: Tensor) -> int:
        self._memory.append(memory)
        return memory.data_ptr()


def can_compile(sequence: nn.Module) -> bool:
    """Whether whole steps of a sequence can be compiled: it is trained, small, float32, and nothing hooks into it."""
    if type(sequence) is not FusedSequential or not AVAILABLE:
        return False
    parameters = list(sequence.parameters())
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in sequence.modules()
    )
    known = all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters)
    return known and not hooked and sum(parameter.numel() for parameter in parameters) <= MAX_PARAMETERS
