"""What every task of classification shares: loss, class weights, probabilities, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dist_train.accel.defined_arithmetic import DefinedArithmetic
from dist_train.accel.defined_random import InitialValues
from dist_train.config.rules import given_class_weights, named_positive_class
from dist_train.config.schema import JobConfig
from dist_train.determinism.arithmetic import Arithmetic
from dist_train.distributed.collectives import Collectives
from dist_train.training.loss import Objective, balanced_draws, balanced_weights, objective_of
from dist_train.training.metrics import classification_metrics, registered_metrics
from dist_train.training.precision import dtype_of
from dist_train.training.protocols import Source
from dist_train.training.selection import OBJECTIVE, Selection


class Classification:
    """The part of a task that follows from its classes, its training rows and the section `train`.

    A mistake in `train.class_weights` is a UserError here, before anything is written; so is a wrong
    `report.positive_class` of a task that has rows.
    """

    def __init__(
        self, config: JobConfig, class_names: Sequence[str], splits: Mapping[str, Source], collectives: Collectives
    ) -> None:
        self._config = config
        self._collectives = collectives
        self._dtype = dtype_of(config.train.precision)
        self._class_names = class_names
        self._training_rows: Source | None = splits.get("train")
        if config.train.class_weights is not None:
            given_class_weights(config.train, class_names)
        if splits:
            named_positive_class(config.report, class_names)

    @property
    def config(self) -> JobConfig:
        """The configuration, with a value for every key that was `auto`."""
        return self._config

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self._class_names)

    def objective(self) -> Objective:
        """The loss of the configuration with its class weights."""
        weights = self._class_weights
        if self._config.train.class_sampling == "balanced_reweighted":
            corrections = torch.nan_to_num(1 / self._draws, posinf=1.0)
            weights = corrections if weights is None else weights * corrections
        return self._objective_of(weights)

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """That of the exact mode, and of scores."""
        return DefinedArithmetic() if self._defined else Arithmetic()

    @property
    def _defined(self) -> bool:
        return self._config.runtime.products == "defined" and self._collectives.device.type == "cpu"

    def initial_values(self) -> AbstractContextManager[object]:
        """Inside the block, weights that are drawn have defined bits, wherever the model is trained."""
        return InitialValues() if self._config.runtime.products == "defined" else nullcontext()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the classes, mean over the members of an ensemble: (rows, classes) float64."""
        return self.arithmetic.probabilities(logits)

    def metrics(self, probabilities: Tensor, targets: Tensor, weights: Tensor | None = None) -> dict[str, Any]:
        """`classification_metrics` of the rows, `objective` where it chooses the epoch, and the registered metrics."""
        of_rows = None if weights is None else weights.numpy()
        rows = (probabilities.numpy(), targets.numpy(), self.class_names, of_rows)
        metrics = classification_metrics(*rows, log=self.arithmetic.log)
        metrics |= self._objective_on(probabilities, targets, weights)
        return metrics | registered_metrics(self._config.evaluation.metrics, *rows)

    def _objective_of(self, weights: Tensor | None) -> Objective:
        """The loss with class weights, (classes,), of what the model gives."""
        train = self._config.train
        return objective_of(train, weights, defined=self._defined and train.virtual_ranks is not None)

    def _objective_on(self, probabilities: Tensor, targets: Tensor, weights: Tensor | None) -> dict[str, float]:
        """The loss that is trained, without label smoothing, with the logs of the probabilities for logits.

        Not of a restored task whose class weights are those of training rows that it does not have.
        """
        train = self._config.train
        drawn = train.class_sampling == "balanced"  # a row counts as often as it is drawn
        needs_rows = train.class_weights == "balanced" or drawn
        if Selection.of(train).metric != OBJECTIVE or (needs_rows and self._training_rows is None):
            return {}
        device = self._collectives.device
        logs = self.arithmetic.log(probabilities.clamp_min(torch.finfo(torch.float64).tiny).numpy())
        logits = torch.from_numpy(logs).to(device, self._dtype)
        by_class = self._class_weights
        if drawn:
            by_class = self._draws if by_class is None else by_class * self._draws
        objective = objective_of(replace(train, label_smoothing=0.0), by_class, defined=self._defined)
        on_device = () if weights is None else (weights.to(device),)
        loss, weight = objective(logits, targets.to(device), (len(targets),), *on_device)
        return {OBJECTIVE: float(loss.double() / weight.double())}

    @cached_property
    def _draws(self) -> Tensor:
        assert self._training_rows is not None
        draws = balanced_draws(self._training_rows.targets, len(self.class_names))
        return draws.to(self._collectives.device, self._dtype)

    @cached_property
    def _class_weights(self) -> Tensor | None:
        train = self._config.train
        if train.class_weights is None:
            return None
        given = given_class_weights(train, self.class_names)
        if given:
            weights = torch.tensor(given, dtype=torch.float64)
        else:
            rows = self._training_rows
            assert rows is not None
            weights = balanced_weights(rows.targets, len(self.class_names), rows.weights)
        return weights.to(self._collectives.device, self._dtype)
