"""Sums over the steps since the last line of metrics. Part of a checkpoint, so that a resumed line is the same line."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_train.training.step import Outcome


class Meter:
    """Loss as numerator and denominator, float64 on the device, added in the order of the steps."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, outcome: Outcome) -> None:
        """Count one step."""
        self._sums += outcome.totals[:2]

    def take_loss(self) -> float:
        """Mean loss since the last call; starts anew."""
        loss, weight = self._sums.tolist()
        self._sums.zero_()
        return float(loss / weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {"sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved sums."""
        self._sums.copy_(state["sums"])
