"""Sums over the steps since the last line of metrics. Part of a checkpoint, so that a resumed line is the same line."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Meter:
    """Loss as numerator and denominator, in float64, added in the order of the steps."""

    def __init__(self) -> None:
        self._loss = self._weight = 0.0

    def add(self, loss: float, weight: float) -> None:
        """Count one step: its loss, summed over rows, and what to divide it by."""
        self._loss += loss
        self._weight += weight

    def take_loss(self) -> float:
        """Mean loss since the last call; starts anew. 0 where all rows had weight 0."""
        mean = self._loss / self._weight if self._weight else 0.0
        self._loss = self._weight = 0.0
        return mean

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {"sums": torch.tensor([self._loss, self._weight], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved sums."""
        self._loss, self._weight = state["sums"].tolist()
