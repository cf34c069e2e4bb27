"""From the numbers of a column to what a model gets of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.data.spec import NumericColumn


def scaled(values: Tensor, column: NumericColumn) -> Tensor:
    """Numbers of a column, (n,) float64, as the encoder hands them on: float64, increasing with the number.

    Centred on the median, divided by the spread and smoothly clipped to (-3, 3) ("robust scaling and smooth clipping",
    Holzmüller, Grinsztajn and Steinwart 2024, "Better by default").
    """
    centred = (values - column.median) * column.scale
    return centred / torch.sqrt(1 + (centred / 3) ** 2)
