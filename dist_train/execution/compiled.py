"""Steps of a small network on one CPU process, several of them in one compiled call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.accel.cpu_mlp import FusedSequential
from dist_train.accel.cpu_network import MAX_ROWS, CompiledNetwork, Updates, can_compile
from dist_train.determinism.batch_context import BatchContext
from dist_train.execution.base import MAX_STEPS
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.execution.optimizer import AdamW
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.training.loss import CrossEntropy
from dist_train.training.protocols import Batch
from dist_train.training.step import EagerStep, Number


class CompiledSteps:
    """What `EagerStep.compute` does, in compiled code; other numbers than the masks of dropout agree to rounding.

    While `hold` is on a step is put off until `settle`, or until there are enough of them: then all of them are one
    gather and one call. The numbers of its result are in tensors that are filled by then. What a step computes does not
    depend on those beside it. A moving average follows each step, so none may be put off where there is one. Steps
    aside for micro-batches, weighted rows, and batches of less than 2 or more than MAX_ROWS rows.
    """

    averages = False

    def __init__(self, eager: EagerStep, model: FinancialClassifier, optimizer: AdamW, objective: CrossEntropy) -> None:
        self._eager = eager
        self._inputs = model.inputs
        self._optimizer = optimizer
        parameters = optimizer.parameters
        assert isinstance(parameters, FlatParameters)
        gradients = parameters.zeros()
        groups = [(start, end, decay) for start, end, _, decay in optimizer.groups]
        weights = (
            torch.ones(len(model.layers[-1].get_parameter("weight")))
            if objective.class_weights is None
            else objective.class_weights
        )
        sequence = model.layers
        assert isinstance(sequence, FusedSequential)
        self._network = CompiledNetwork(
            sequence,
            Updates(parameters.values, gradients, optimizer.moments, groups),
            lambda parameter: parameters.view(gradients, parameter),
            weights.float(),
            objective.label_smoothing,
        )
        self._held = False
        self._over = False
        """A step that was put off had no finite loss: those after it are not taken."""
        self._weighted: bool | None = None
        self._batches: list[Batch] = []
        self._rates: list[float | Tensor] = []
        self._results = torch.zeros((MAX_STEPS, 5), dtype=torch.float64)

    def hold(self, *, on: bool) -> None:
        """Put steps off from now on, or do so no more; those that were and not computed are dropped."""
        self._held, self._over = on, False
        self._batches, self._rates = [], []

    def settle(self, *, wait: bool = True) -> int | None:  # noqa: ARG002
        """Compute what was put off; None where there was nothing, otherwise 0: nothing is under way."""
        batches, results = self._batches, self._results
        if not batches:
            return None
        rates, self._batches, self._rates = self._rates, [], []
        self._results = torch.zeros_like(results)
        if self._over:
            return 0
        optimizer, largest = self._optimizer, self._eager.max_grad_norm
        settings = np.empty((len(batches), 6))
        settings[:, 0], settings[:, 1:4] = rates, (*optimizer.betas, optimizer.eps)
        settings[:, 4] = optimizer.steps_taken + 1 + np.arange(len(batches))
        settings[:, 5] = np.inf if largest is None else largest
        batch = batches[0]
        if len(batches) > 1:
            batch = batch.by_index(torch.cat([one.index for one in batches]), batch.context)
        with torch.no_grad():
            inputs: Tensor = self._inputs(*batch.inputs)
        taken = self._network.take(inputs, batch.targets, [one.context for one in batches], settings, results)
        optimizer.count_steps(taken)
        self._over = self._held and taken < len(batches)
        return 0

    def compute(
        self, batches: Sequence[Batch], lr: float | Tensor, vote: float | Tensor
    ) -> tuple[Tensor, Number, Tensor | bool]:
        """Totals, gradient norm, and whether both were finite, as of `EagerStep.compute`."""
        if not self._takes(batches):
            self.settle()
            return self._eager.compute(batches, lr, vote)
        result = self._results[len(self._batches)]
        result[2] = vote
        self._batches.append(batches[0])
        self._rates.append(lr)
        if not self._held:
            self.settle()
            finite = bool(result[4])
            if self._eager.average is not None:
                self._eager.average.update(finite)
            return result[:3], result[3].item(), finite
        if len(self._batches) == MAX_STEPS:
            self.settle()
        return result[:3], result[3], result[4]

    def _takes(self, batches: Sequence[Batch]) -> bool:
        if len(batches) != 1 or not self._network.ready:
            return False
        if self._weighted is None:
            self._weighted = batches[0].weights is not None
        context: BatchContext = batches[0].context
        return not self._weighted and len(context.slices) == 1 and 2 <= context.slices[0] <= MAX_ROWS


def compile_steps(eager: EagerStep, model: nn.Module) -> CompiledSteps | None:
    """The compiled computation of a step, where it can be compiled."""
    optimizer, objective = eager.optimizer, eager.objective
    if (
        type(model) is not FinancialClassifier
        or type(objective) is not CrossEntropy
        or not isinstance(optimizer, AdamW)
    ):
        return None
    if eager.autocast_dtype is not None or next(model.inputs.parameters(), None) is not None:
        return None
    if any(multiplier != 1.0 for _, _, multiplier, _ in optimizer.groups):
        return None
    return CompiledSteps(eager, model, optimizer, objective) if can_compile(model.layers) else None
