"""Piecewise linear embeddings of numbers as one node of autograd: a number touches its own bin, not all of them.

The authors' module makes (rows, columns, bins) of shares and multiplies them by a matrix for each column. All shares
below the bin of a number are 1 and all above it are 0, so its value is a prefix sum of weights plus a share of one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_train.accel.compiled import compiled
from dist_train.accel.cpu_kernels import Array
from dist_train.determinism.arithmetic import written_out


def fuse_piecewise_linear(model: nn.Module) -> nn.Module:
    """Fuse each PiecewiseLinearEmbeddings (version B, no activation) of rtdl_num_embeddings in a model; in place.

    Other modules stay as they are, and state_dict keys do not change.
    """
    rtdl = sys.modules.get("rtdl_num_embeddings")
    for module in model.modules():
        if rtdl and type(module) is rtdl.PiecewiseLinearEmbeddings:
            embeddings = cast(Any, module)
            if embeddings.linear0 is not None and embeddings.activation is None and embeddings.linear.bias is None:
                plain_forward = type(module).forward
                module.__class__ = FusedPiecewiseLinear
                cast(FusedPiecewiseLinear, module).plain_forward = plain_forward
    return model


class FusedPiecewiseLinear(nn.Module):
    """What the plain module makes of the same numbers, in training faster; in evaluation it is the plain module.

    Shapes: (rows, columns) -> (rows, columns, width), float32 or float64, on the CPU. Numbers agree to rounding.
    """

    plain_forward: Callable[[Any, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of the numbers."""
        own = cast(Any, self)
        trained = (own.linear0.weight, own.linear0.bias, own.linear.weight)
        if not (
            self.training
            and torch.is_grad_enabled()
            and not x.requires_grad
            and x.ndim == 2
            and x.dtype == own.linear.weight.dtype
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and all(p.requires_grad for p in trained)
        ):
            return self.plain_forward(self, x)
        return cast(Tensor, _PiecewiseLinear.apply(x, own.impl, *trained))


class _PiecewiseLinear(torch.autograd.Function):
    @staticmethod
    @written_out
    def forward(ctx: Any, x: Tensor, knots: Any, weight: Tensor, bias: Tensor, of_bins: Tensor) -> Tensor:
        numbers = x.contiguous().numpy()
        slopes, shifts, last = knots.weight.numpy(), knots.bias.numpy(), _bins_of(knots)
        columns, _, width = of_bins.shape
        sums = np.empty((columns, of_bins.shape[1] + 1, width), numbers.dtype)
        prefix_sums(of_bins.detach().numpy(), last, bias.detach().numpy(), sums)
        out = x.new_empty((len(x), columns, width))
        bins, shares = np.empty(numbers.shape, np.int32), np.empty_like(numbers)
        embed(
            numbers, slopes, shifts, last, weight.detach().numpy(), of_bins.detach().numpy(), sums, bins, shares,
            out.numpy(),
        )  # fmt: skip
        ctx.kept = numbers, bins, shares, last, of_bins.shape
        return out

    @staticmethod
    @once_differentiable
    @written_out
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        numbers, bins, shares, last, shape = ctx.kept
        columns, num_bins, width = shape
        # Of each bin, over the numbers in it: the sum of gradients, and that of gradients times the share.
        totals = np.zeros((columns, num_bins, 2, width))
        of_weight = np.zeros((columns, width))
        embed_backward(grad.contiguous().numpy(), numbers, bins, shares, of_weight, totals)
        of_bias, of_bins = np.zeros((columns, width)), np.zeros(shape)
        finish(totals, last, of_bias, of_bins)
        return None, None, *(torch.from_numpy(found).to(grad.dtype) for found in (of_weight, of_bias, of_bins))


def _bins_of(knots: Any) -> Array:
    """Number of bins of each column; the module keeps the last of them in the last place, whatever their number."""
    columns, most = knots.weight.shape
    if knots.mask is None:
        return np.full(columns, most, np.int64)
    return cast(Array, knots.mask.sum(1).numpy())


@compiled
def prefix_sums(of_bins: Array, num_bins: Array, bias: Array, sums: Array) -> None:
    """The bias and the weights of all bins below a bin, for each bin: (columns, bins + 1, width)."""
    columns, _, width = of_bins.shape
    for column in range(columns):
        for i in range(width):
            sums[column, 0, i] = bias[column, i]
        for place in range(num_bins[column] - 1):
            for i in range(width):
                sums[column, place + 1, i] = sums[column, place, i] + of_bins[column, place, i]


@compiled
def embed(
    numbers: Array, slopes: Array, shifts: Array, num_bins: Array, weight: Array, of_bins: Array, sums: Array,
    bins: Array, shares: Array, out: Array,
) -> None:  # fmt: skip
    """The vectors of numbers, (rows, columns) -> (rows, columns, width); the bin of each, and its share of that bin."""
    rows, columns = numbers.shape
    most, width = of_bins.shape[1], of_bins.shape[2]
    one, none = numbers.dtype.type(1), numbers.dtype.type(0)
    for row in range(rows):
        for column in range(columns):
            x, count = numbers[row, column], num_bins[column]
            # The last bin that begins below the number; the first one has no beginning.
            low, high = 0, count - 1
            while low < high:
                middle = (low + high + 1) // 2
                place = middle if middle < count - 1 else most - 1
                if x * slopes[column, place] + shifts[column, place] > 0:
                    low = middle
                else:
                    high = middle - 1
            place = low if low < count - 1 else most - 1
            share = x * slopes[column, place] + shifts[column, place]
            if low < count - 1:
                share = min(share, one)
            if low > 0:
                share = max(share, none)
            bins[row, column], shares[row, column] = low, share
            for i in range(width):
                out[row, column, i] = sums[column, low, i] + x * weight[column, i] + share * of_bins[column, place, i]


@compiled
def embed_backward(
    gradient: Array, numbers: Array, bins: Array, shares: Array, of_weight: Array, totals: Array
) -> None:
    """Add up what rows contribute to the gradients."""
    rows, columns, width = gradient.shape
    for row in range(rows):
        for column in range(columns):
            of_bin = totals[column, bins[row, column]]
            x, share = numbers[row, column], shares[row, column]
            for i in range(width):
                g = gradient[row, column, i]
                of_weight[column, i] += g * x
                of_bin[0, i] += g
                of_bin[1, i] += g * share


@compiled
def finish(totals: Array, num_bins: Array, of_bias: Array, of_bins: Array) -> None:
    """Gradients of bias and weights of bins: those of a bin take its own shares, and all numbers in later bins."""
    columns, most, width = of_bins.shape
    for column in range(columns):
        count = num_bins[column]
        for low in range(count - 1, -1, -1):
            place = low if low < count - 1 else most - 1
            for i in range(width):
                of_bins[column, place, i] = totals[column, low, 1, i] + of_bias[column, i]
                of_bias[column, i] += totals[column, low, 0, i]
