"""The quantile function of the normal distribution in operations that ONNX has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Coefficients of `ndtri` of Moshier's Cephes library, which torch.special.ndtri computes as well.
_P0 = (-5.99633501014107895267e1, 9.80010754185999661536e1, -5.66762857469070293439e1, 1.39312609387279679503e1,
       -1.23916583867381258016e0)  # fmt: skip
_Q0 = (1.0, 1.95448858338141759834e0, 4.67627912898881538453e0, 8.63602421390890590575e1, -2.25462687854119370527e2,
       2.00260212380060660359e2, -8.20372256168333339912e1, 1.59056225126211695515e1,
       -1.18331621121330003142e0)  # fmt: skip
_P1 = (4.05544892305962419923e0, 3.15251094599893866154e1, 5.71628192246421288162e1, 4.40805073893200834700e1,
       1.46849561928858024014e1, 2.18663306850790267539e0, -1.40256079171354495875e-1, -3.50424626827848203418e-2,
       -8.57456785154685413611e-4)  # fmt: skip
_Q1 = (1.0, 1.57799883256466749731e1, 4.53907635128879210584e1, 4.13172038254672030440e1, 1.50425385692907503408e1,
       2.50464946208309415979e0, -1.42182922854787788574e-1, -3.80806407691578277194e-2,
       -9.33259480895457427372e-4)  # fmt: skip
_TAIL = 0.13533528323661269189  # exp(-2)
_ROOT = 2.50662827463100050242  # sqrt(2 pi)
# The tail's rational function is one of two: this one is for shares above exp(-32).
_SMALLEST_SHARE = 1e-13


def normal_quantile(shares: Tensor) -> Tensor:
    """Quantiles of shares, float64; those of shares nearer than 1e-13 to 0 or 1 are those of 1e-13 and 1 - 1e-13."""
    # The bound is on the tail: torch's exporter makes bounds of `clamp` float32, where 1 - 1e-13 is 1.
    tail = torch.minimum(shares, 1 - shares).clamp(min=_SMALLEST_SHARE)
    centred = shares - 0.5
    squared = centred * centred
    middle = (centred + centred * (squared * _polynomial(squared, _P0) / _polynomial(squared, _Q0))) * _ROOT
    root = torch.sqrt(-2 * torch.log(tail))
    inverse = 1 / root
    outer = root - torch.log(root) / root - inverse * _polynomial(inverse, _P1) / _polynomial(inverse, _Q1)
    return torch.where(tail > _TAIL, middle, torch.where(centred < 0, -outer, outer))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
