"""From the numbers of a column to what a model gets of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.data.encoding.spec import NumericColumn

LARGEST_NORMAL = 5.199337582605575
"""Quantile of the normal distribution at 1 - 1e-7: what the smallest and the largest training value become."""


def scaled(values: Tensor, column: NumericColumn) -> Tensor:
    """Numbers of a column, (n,) float64, as the encoder hands them on: float64, never falling where numbers rise.

    Robust: centred on the median, divided by the spread and smoothly clipped to (-3, 3), so that a heavy tail neither
    stretches the scale nor dominates a batch ("robust scaling and smooth clipping", Holzmüller, Grinsztajn and
    Steinwart 2024, "Better by default").

    Quantile: the quantile of the normal distribution at the share of training rows below, as scikit-learn's
    QuantileTransformer(output_distribution="normal") has it. The share is interpolated between the quantiles; a number
    that several of them hold gets the mean of the outermost shares. From the smallest and the largest training number
    on it is `LARGEST_NORMAL`, with its sign. A column of one number or none becomes 0.
    """
    if column.transform == "robust":
        centred = (values - column.median) * column.scale
        clipped: Tensor = centred / torch.sqrt(1 + (centred / 3) ** 2)
        return clipped
    if column.scale == 0:
        return torch.zeros_like(values)
    shares = _shares_below(values, torch.tensor(column.quantiles, dtype=torch.float64))
    normal: Tensor = torch.special.ndtri(shares)
    return normal.clamp_(-LARGEST_NORMAL, LARGEST_NORMAL)


def _shares_below(values: Tensor, quantiles: Tensor) -> Tensor:
    """The distribution function of evenly spaced quantiles at values, (n,), NaN where they are NaN."""
    last = len(quantiles) - 1
    first_not_below = torch.searchsorted(quantiles, values).clamp_(1, last)
    first_above = torch.searchsorted(quantiles, values, right=True)
    low, high = quantiles[first_not_below - 1], quantiles[first_not_below]
    places = (first_not_below - 1) + (values - low) / (high - low)
    held = (first_above > first_not_below) & (values == high)
    places = torch.where(held, (first_not_below + first_above - 1) / 2, places)
    places = torch.where(values <= quantiles[0], 0.0, places)
    return torch.where(values >= quantiles[last], float(last), places) / last
