"""BatchNorm over the rows of all ranks, on any backend."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.slices import split_slices
from dist_train.distributed.collectives import Collectives


def sync_batch_norm(
    model: nn.Module, collectives: Collectives | None = None, context: ModelContext | None = None
) -> nn.Module:
    """Let every BatchNorm of a model see the rows of all ranks; state_dict keys do not change.

    Every BatchNorm1d becomes a `GatheredBatchNorm1d`: on several ranks, and on the CPU also in a world of one, so that
    one process rounds as several do. torch's SyncBatchNorm refuses CPU tensors, and under autocast a rank without rows
    sends it a message of another size than the others do. It takes the place of the other BatchNorm layers on several
    GPUs; on several CPU ranks they raise TypeError. `context` is that of the model; without it the rows are counted in
    each batch. Without `collectives` the ranks are those of torch's default process group.
    """
    if collectives is None:
        collectives = Collectives.of_default_group(next(model.parameters(), torch.empty(0)).device)
    alone, on_gpu = collectives.size == 1, collectives.device.type == "cuda"
    if alone and on_gpu:
        return model
    if type(model) is nn.BatchNorm1d:
        return GatheredBatchNorm1d.from_plain(model, collectives, context)
    for name, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm1d:
            model.set_submodule(name, GatheredBatchNorm1d.from_plain(module, collectives, context))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not alone:
            if not on_gpu:
                raise TypeError(f"{name}: {type(module).__name__} cannot be synchronised on {collectives.device}")
            model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))
    return model


def zero_grad_of_biases_before_batchnorm(model: nn.Module) -> nn.Module:
    """Give the bias of a Linear that feeds a BatchNorm in a Sequential the gradient that it has: none; in place.

    BatchNorm subtracts the mean of its batch, and with it the bias. What reaches the bias is rounding noise, which
    AdamW scales up to steps as large as any: the bias walks at random, in another way on every world size, and the
    running mean, which follows it with a delay, carries that into the outputs in evaluation (5e-4 in a probability
    after one epoch of the default job). In evaluation mode the statistics are constants and the gradient is real.
    """
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for linear, norm in pairwise(module):
                feeds = type(linear) is nn.Linear and isinstance(norm, nn.modules.batchnorm._BatchNorm)
                if feeds and linear.bias is not None and linear.bias.requires_grad:
                    linear.__class__ = _LinearBeforeBatchNorm
                    linear.norm = (norm,)  # type: ignore[assignment]  # a tuple: not a module of this one
    return model


class _LinearBeforeBatchNorm(nn.Linear):
    """nn.Linear whose bias is given zeros for a gradient while the BatchNorm after it is in training.

    They are handed to autograd as they are: their sum over all rows is not computed first.
    """

    row_wise = True
    norm: tuple[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        """What nn.Linear puts out."""
        if not (self.norm[0].training and torch.is_grad_enabled()):
            return super().forward(input)
        output: Tensor = _ZeroGradient.apply(F.linear(input, self.weight, self.bias.detach()), self.bias)
        return output


class _ZeroGradient(torch.autograd.Function):
    """The first argument; the gradient of the second is zeros, for DistributedDataParallel waits for one."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor) -> Tensor:
        ctx.bias = bias
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.bias)


class GatheredBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d whose batch is the rows of all slices of all ranks; a slice may hold any number of them, also none.

    Shapes: (rows, num_features). Output, gradients and running statistics are those of nn.BatchNorm1d on the joined
    batch, and the same bits however many ranks hold the slices. Every rank must call it at the same time, in training
    and in its backward pass.
    """

    collectives: Collectives
    context: ModelContext | None
    by_slice: bool

    @classmethod
    def from_plain(
        cls,
        plain: nn.BatchNorm1d,
        collectives: Collectives,
        context: ModelContext | None = None,
        *,
        by_slice: bool = False,
    ) -> GatheredBatchNorm1d:
        """The synchronised twin of a plain layer; it takes over the layer's own parameters and buffers.

        `context` is that of its model, which knows the rows of all ranks. `by_slice`: the slices of the batch at hand
        are kept apart, and the gradient of each goes to `context.gradients`; otherwise the rows of a rank are one
        slice, and autograd gets the gradients.
        """
        twin = cls(plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats)
        twin._parameters = plain._parameters
        twin._buffers = plain._buffers
        twin.collectives = collectives
        twin.context = context
        twin.by_slice = by_slice
        return twin.train(plain.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalised rows."""
        if not self.training:
            # Ranks evaluate different numbers of batches: whatever the statistics are, each batch stands for itself.
            return super().forward(input)
        if input.ndim != 2:
            raise ValueError(f"expected (rows, {self.num_features}), got a tensor of {input.ndim} dimensions")
        # Half-precision rows are normalised in the precision of the parameters, as torch does.
        rows = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        normalised: Tensor = _Normalise.apply(rows, self.weight, self.bias, self)
        return normalised.to(input.dtype)

    def rows_of_batch(self, counts: Tensor) -> float:
        """The rows of the batch at hand over all ranks; `counts`, (features,), holds that number on the device.

        The host knows it where the model was told of its batch, and then waits for nothing.
        """
        known = None if self.context is None else self.context.batch.global_rows
        return self.require_rows(counts[0].item() if known is None else known)

    def require_rows(self, count: float) -> float:
        """The rows over all ranks, which must be enough to have a variance."""
        if count < 2:
            raise ValueError("BatchNorm needs at least two rows over all ranks in training")
        return float(count)

    def count_batch(self) -> Any:
        """The share that a new batch has in the running statistics; None where there are none.

        On a GPU, where it depends on a number there, it is a tensor, ().
        """
        batches = self.num_batches_tracked
        if batches is None:
            return None
        batches.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1 / float(batches) if batches.device.type == "cpu" else batches.double().reciprocal()

    def update_running_stats(self, mean: Tensor, var: Tensor, count: float) -> None:
        """Let the running statistics follow those of a batch of `count` rows over all ranks."""
        share = self.count_batch()
        if share is not None:
            for buffer, now in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                average = cast(Tensor, buffer)
                average += (now - average) * share


class _Normalise(torch.autograd.Function):
    """Two communications: (count, mean, variance) of each slice forwards, two sums over its rows backwards.

    The forward pass is float64 up to one rounding at its end: features may be far from zero,
    and the cut of a batch into slices shows only in the rare number whose rounding 1e-16 tips over. Fewer differences
    matter: one that turns a ReLU on or off for one row sets two trainings apart for good.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: GatheredBatchNorm1d) -> Tensor:
        sliced = norm.context if norm.by_slice else None
        lengths = sliced.batch.slices if sliced else ()
        wide = [part.double() for part in split_slices(x, lengths)]
        own = torch.stack([_statistics(part) for part in wide])
        counts, mean, var = gather_stats(norm.collectives.all_gather(own).flatten(0, 1))
        count = norm.rows_of_batch(counts)
        norm.update_running_stats(mean, var, count)
        inverse_std = torch.rsqrt(var + norm.eps)
        shift = -mean * inverse_std
        normals = [torch.addcmul(shift, part, inverse_std).to(x.dtype) for part in wide]
        ctx.collectives, ctx.lengths, ctx.normals = norm.collectives, lengths, normals
        ctx.gradients = sliced.gradients if sliced else None
        ctx.weight, ctx.bias, ctx.inverse_std, ctx.count = weight, bias, inverse_std, count
        outputs = normals
        if weight is not None and bias is not None:
            outputs = [torch.addcmul(bias, normal, weight) for normal in normals]
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = list(zip(split_slices(grad, ctx.lengths), ctx.normals, strict=True))
        own = torch.stack([torch.stack([g.sum(0), (g * normal).sum(0)]) for g, normal in pairs])
        sums = ctx.collectives.ordered_sum(own)
        scale = ctx.inverse_std if ctx.weight is None else ctx.inverse_std * ctx.weight
        shift, product_scale = (-sums / ctx.count * scale).to(grad.dtype)
        scale = scale.to(grad.dtype)
        grad_input = torch.cat([torch.addcmul(shift, g, scale).addcmul_(n, product_scale) for g, n in pairs])
        grad_weight = grad_bias = None
        if ctx.weight is not None:
            if ctx.gradients is None:
                grad_bias, grad_weight = own.sum(0)
            else:
                for of_slice, sums_of_slice in zip(ctx.gradients, own, strict=True):
                    for parameter, gradient in zip((ctx.bias, ctx.weight), sums_of_slice, strict=True):
                        if parameter in of_slice:  # a frozen one is not
                            of_slice[parameter] += gradient
        return grad_input, grad_weight, grad_bias, None


def _statistics(rows: Tensor) -> Tensor:
    """Count (in each column: one tensor is one communication), mean and variance: (rows, C) -> (3, C)."""
    statistics = rows.new_zeros((3, rows.shape[1]))
    if len(rows):
        # torch's own kernel for the statistics of a BatchNorm: var_mean takes ten times as long along dimension 0.
        statistics[0] = len(rows)
        statistics[1], statistics[2] = torch.batch_norm_update_stats(rows, None, None, 0.0)
    return statistics


def gather_stats(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of all rows from those of their parts, in order: (parts, 3, C) -> three times (C,).

    Chan, Golub and LeVeque (1983, "Algorithms for computing the sample variance").
    """
    counts, means, variances = parts.unbind(1)
    if len(parts) == 1:
        return counts[0], means[0], variances[0]
    total = counts.sum(0)
    grad_scale = total.clamp(min=1)  # parts without rows, all of them: zeros, and not NaN
    mean = (means * counts).sum(0) / grad_scale
    return total, mean, (counts * (variances + (means - mean) ** 2)).sum(0) / grad_scale
