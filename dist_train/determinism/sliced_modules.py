"""The exact mode: arithmetic on V fixed slices of the batch, the same bits wherever the slices are computed.

Every kernel sees one slice, in memory of its own, so it sees the same shapes on every world size. What crosses slices
(BatchNorm statistics, gradients) is gathered and added up in one fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.determinism.batch_norm import GatheredBatchNorm1d
from dist_train.determinism.dropout import KeyedDropout
from dist_train.determinism.slices import Slices
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError

# What each of them makes of a row depends on that row alone. Exactly these types: a subclass may do anything.
_ROW_WISE = {
    nn.Linear, nn.LayerNorm, KeyedDropout, nn.Identity,
    nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.Sigmoid, nn.Tanh, nn.Softplus,
}  # fmt: skip


class UnknownModuleError(UserError):
    """A module of which it is not known that it can be computed slice by slice."""


def convert_virtual_ranks(model: nn.Module, slices: Slices, collectives: Collectives) -> nn.Module:
    """Make a model compute slice by slice, in place; state_dict keys do not change.

    Gradients go to `slices.gradients`, which must be there by the first backward pass (`Slices.keep_gradients`).

    Knows Linear, BatchNorm1d, Embedding, LayerNorm, KeyedDropout (see `convert_dropout`), common activations, and
    modules made of them. UnknownModuleError names any other module, and any module with parameters or buffers of its
    own: they would be computed in an order that depends on the world size.

    What a container's `forward` does between its modules must treat each row by itself, as concatenating columns does
    and subtracting `x.mean(0)` does not: it sees all rows of a rank at once, and nobody can convert it.
    `check_row_wise` finds what shows on a few rows.
    """
    return _convert(model, "the model", slices, collectives)


@torch.no_grad()
def check_row_wise(model: nn.Module, inputs: Sequence[Tensor], name: str) -> None:
    """UnknownModuleError when the outputs of a converted model for some rows, in evaluation, are not those of each row.

    `inputs` are its arguments, each (rows, ...); `name` is what the message calls it.
    """
    was_training = model.training
    model.eval()
    together = model(*inputs)
    alone = torch.cat([model(*row) for row in zip(*(x.split(1) for x in inputs), strict=True)])
    model.train(was_training)
    # Kernels for one row and for several round differently; rows that are mixed differ by far more.
    tolerance = 1e-3 * together.abs().max()
    if alone.shape != together.shape or ((alone - together).abs() > tolerance).any():
        raise UnknownModuleError(
            f"train.virtual_ranks: what {name} puts out for a row depends on the rows beside it, so it cannot be "
            "computed slice by slice: leave train.virtual_ranks null, or let its forward treat each row by itself"
        )


class SlicedSequential(nn.Sequential):
    """nn.Sequential that takes each slice through a run of row-wise modules at once, while it is in the cache."""

    slices: Slices

    def forward(self, input: Tensor) -> Tensor:
        """What the modules make of the rows, one after the other."""
        for row_wise, run in groupby(self, _is_row_wise):
            modules = list(run)
            if row_wise:
                input = run_sliced(modules, input, self.slices)
            else:
                for module in modules:
                    input = module(input)
        return input


class Sliced(nn.Module):
    """A row-wise module that stands alone."""

    def __init__(self, plain: nn.Module, slices: Slices) -> None:
        super().__init__()
        # Its parameters and buffers are this module's own, so that their names stay what they were.
        self._parameters = plain._parameters
        self._buffers = plain._buffers
        self._plain = [plain]
        self.slices = slices

    def forward(self, input: Tensor) -> Tensor:
        """What the plain module makes of the rows."""
        return run_sliced(self._plain, input, self.slices)


def run_sliced(modules: Sequence[nn.Module], rows: Tensor, slices: Slices) -> Tensor:
    """A run of row-wise modules, slice by slice in training, on all rows at once in evaluation.

    Evaluation cuts its passes by row number: they are the same for every world size as they are.
    """
    if not torch.is_grad_enabled():
        for module in modules:
            rows = module(rows)
        return rows
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    output: Tensor = _Sliced.apply(rows, modules, slices, *parameters)
    return output


class _Sliced(torch.autograd.Function):
    """A graph of its own for each slice; its gradients are kept apart from those of the other slices."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, modules: Sequence[nn.Module], slices: Slices, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.parameters, ctx.slices, ctx.graphs = parameters, slices, []
        with torch.enable_grad():
            for part in slices.each(rows.detach()):
                part = output = part.requires_grad_(ctx.needs_input_grad[0])
                for module in modules:
                    output = module(output)
                ctx.graphs.append((part, output))
        return torch.cat([output.detach() for _, output in ctx.graphs])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wants_input = ctx.needs_input_grad[0]
        pieces = []
        for index, own in enumerate(ctx.slices.split(grad)):
            part, output = ctx.graphs[index]
            ctx.graphs[index] = None  # its memory is free as soon as its gradients are there
            wanted = [*ctx.parameters, part] if wants_input else ctx.parameters
            found = torch.autograd.grad(output, wanted, own)
            for parameter, gradient in zip(ctx.parameters, found, strict=False):
                ctx.slices.gradients[index][parameter] += gradient
            if wants_input:
                pieces.append(found[-1])
        return torch.cat(pieces) if wants_input else None, None, None, *(None for _ in ctx.parameters)


def _is_row_wise(module: nn.Module) -> bool:
    kind = type(module)
    if kind is nn.Softmax:
        return module.dim in (1, -1)
    if kind is nn.Flatten:
        return isinstance(module.start_dim, int) and module.start_dim >= 1
    if kind is nn.Embedding:
        # max_norm writes to the weights in the forward pass; the other two count rows, or have sparse gradients.
        return module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
    return kind in _ROW_WISE


def _convert(module: nn.Module, name: str, slices: Slices, collectives: Collectives) -> nn.Module:
    if type(module) is nn.BatchNorm1d:
        return GatheredBatchNorm1d.from_plain(module, collectives, slices)
    if _is_row_wise(module):
        return Sliced(module, slices)
    children = list(module.named_children())
    own = [f"its own parameter {n}" for n, _ in module.named_parameters(recurse=False)]
    own += [f"its own buffer {n}" for n, _ in module.named_buffers(recurse=False)]
    if own or not children:
        what = own[0] if own and children else "it"
        raise UnknownModuleError(
            f"train.virtual_ranks: {name} is a {type(module).__name__}, and {what} cannot be computed slice by slice: "
            "leave train.virtual_ranks null, or teach determinism/sliced_modules.py"
        )
    in_sequence = type(module) is nn.Sequential
    for child_name, child in children:
        if not (in_sequence and _is_row_wise(child)):
            path = f"{name}.{child_name}" if name != "the model" else child_name
            setattr(module, child_name, _convert(child, path, slices, collectives))
    if in_sequence:
        module.__class__ = SlicedSequential
        module.slices = slices  # type: ignore[assignment]
    return module


def require_world_size(virtual_ranks: int, world_size: int) -> None:
    """UserError when the virtual ranks cannot be shared out evenly; it lists the world sizes that work."""
    if virtual_ranks % world_size:
        sizes = [str(n) for n in range(1, virtual_ranks + 1) if virtual_ranks % n == 0]
        raise UserError(
            f"train.virtual_ranks={virtual_ranks} cannot be shared by {world_size} ranks; "
            f"it works on {', '.join(sizes[:-1])}{' or ' if sizes[:-1] else ''}{sizes[-1]}"
        )
