"""Modules of the exact mode: each slice of the batch is computed on its own, the same bits wherever that happens.

A kernel sees one slice, in memory of its own, so it sees the same shapes on every world size. What crosses slices
(BatchNorm statistics, gradients) is gathered and added up in one fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.batch_norm import GatheredBatchNorm1d
from dist_train.determinism.dropout import KeyedDropout
from dist_train.determinism.slices import split_slices
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError

# torch's own modules whose output for a row depends on that row alone. Exactly these types: a subclass may do anything.
_ROW_WISE = {
    nn.Linear, nn.LayerNorm, KeyedDropout, nn.Identity,
    nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.Sigmoid, nn.Tanh, nn.Softplus,
}  # fmt: skip


class UnknownModuleError(UserError):
    """A module of which it is not known that it can be computed slice by slice."""


def convert_virtual_ranks(model: nn.Module, context: ModelContext, collectives: Collectives) -> nn.Module:
    """Make a model compute slice by slice, in place; state_dict keys do not change.

    Gradients go to `context.gradients`, which must be there by the first backward pass.

    Known are Linear, BatchNorm1d, Embedding, LayerNorm, KeyedDropout (see `convert_dropout`), common activations, and
    containers of them. Any other module can declare `row_wise = True`: its output for a row depends on that row alone.
    It is then computed slice by slice as a whole, with all the parameters inside it. A container that declares nothing
    may move and combine rows elementwise between its modules; `own_operations.check_own_operations` refuses others.

    Raises:
        UnknownModuleError: a module that neither is known nor declares itself, or that has parameters or buffers of its
            own: they would be computed in an order that depends on the world size.
    """
    return _convert(model, "the model", context, collectives)


@torch.no_grad()
def check_row_wise(model: nn.Module, inputs: Sequence[Tensor], name: str) -> None:
    """Compare the outputs of a converted model for some rows, in evaluation, with those for each row alone.

    `inputs` are its arguments, each (rows, ...); `name` is what the message calls it.

    Raises:
        UnknownModuleError: they differ by more than rounding.
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

    context: ModelContext

    def forward(self, input: Tensor) -> Tensor:
        """What the modules make of the rows, one after the other."""
        for row_wise, run in groupby(self, is_row_wise):
            modules = list(run)
            if row_wise:
                input = _run_sliced(modules, self.context, input)
            else:
                for module in modules:
                    input = module(input)
        return input


class Sliced(nn.Module):
    """A row-wise module that stands alone; with all that is inside it, computed slice by slice."""

    def __init__(self, plain: nn.Module, context: ModelContext) -> None:
        super().__init__()
        # Its parameters, buffers and modules are this module's own, so that their names stay what they were.
        self._parameters = plain._parameters
        self._buffers = plain._buffers
        self._modules = plain._modules
        self._non_persistent_buffers_set = plain._non_persistent_buffers_set
        self._plain = [plain]
        self.context = context

    def train(self, mode: bool = True) -> Sliced:
        """Set the mode of the plain module as well."""
        self._plain[0].train(mode)
        return super().train(mode)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the plain module makes of the rows."""
        return _run_sliced(self._plain, self.context, *inputs)


def _run_sliced(modules: Sequence[nn.Module], context: ModelContext, *inputs: Tensor) -> Tensor:
    """A run of row-wise modules, slice by slice in training, on all rows at once in evaluation.

    Evaluation cuts its passes by row number: they are the same for every world size as they are.
    """
    if not torch.is_grad_enabled():
        return _run(modules, inputs)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    output: Tensor = _Sliced.apply(modules, context, len(inputs), *inputs, *parameters)
    return output


def _run(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Tensor:
    first, *others = modules
    output: Tensor = first(*inputs)
    for module in others:
        output = module(output)
    return output


class _Sliced(torch.autograd.Function):
    """A graph of its own for each slice; its gradients are kept apart from those of the other slices."""

    @staticmethod
    def forward(
        ctx: Any, modules: Sequence[nn.Module], context: ModelContext, num_inputs: int, *tensors: Tensor
    ) -> Tensor:
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        wanted = ctx.needs_input_grad[3 : 3 + num_inputs]
        batch, graphs, place = context.batch, [], 0
        slices = zip(*(split_slices(x.detach(), batch.slices) for x in inputs), strict=True)
        with torch.enable_grad(), context.arithmetic.of_torch():
            for own in slices:
                leaves = [x.requires_grad_() if wants else x for x, wants in zip(own, wanted, strict=True)]
                length = len(leaves[0])
                with context.bound(batch.part(place, length)):
                    graphs.append((leaves, _run(modules, leaves)))
                place += length
        ctx.parameters, ctx.lengths, ctx.graphs, ctx.wanted = parameters, batch.slices, graphs, wanted
        ctx.gradients, ctx.arithmetic = context.gradients, context.arithmetic
        return torch.cat([output.detach() for _, output in graphs])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        num_inputs, num_parameters = len(ctx.wanted), len(ctx.parameters)
        pieces: list[list[Tensor]] = [[] for _ in ctx.wanted]
        for index, own in enumerate(split_slices(grad, ctx.lengths)):
            leaves, output = ctx.graphs[index]
            ctx.graphs[index] = None  # its memory is free as soon as its gradients are there
            inputs = [x for x, wants in zip(leaves, ctx.wanted, strict=True) if wants]
            # A module need not use all of its parameters in each mode; the gradient of such a one is None.
            with ctx.arithmetic.of_torch():
                found = torch.autograd.grad(output, [*ctx.parameters, *inputs], own, allow_unused=True)
            for parameter, gradient in zip(ctx.parameters, found, strict=False):
                if gradient is not None:
                    ctx.gradients[index][parameter] += gradient
            of_inputs = iter(found[num_parameters:])
            for number in range(num_inputs):
                if ctx.wanted[number]:
                    gradient = next(of_inputs)
                    pieces[number].append(torch.zeros_like(leaves[number]) if gradient is None else gradient)
        gradients = [torch.cat(parts) if parts else None for parts in pieces]
        return None, None, None, *gradients, *(None for _ in ctx.parameters)


def is_row_wise(module: nn.Module) -> bool:
    """Whether a module's output for a row depends on that row alone: it is known to, or declares `row_wise = True`."""
    kind = type(module)
    if kind is nn.Softmax:
        return module.dim in (1, -1)
    if kind is nn.Flatten:
        return isinstance(module.start_dim, int) and module.start_dim >= 1
    if kind is nn.Embedding:
        # max_norm writes to the weights in the forward pass; the other two count rows, or have sparse gradients.
        return module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
    return kind in _ROW_WISE or getattr(module, "row_wise", False) is True


def _convert(module: nn.Module, name: str, context: ModelContext, collectives: Collectives) -> nn.Module:
    if type(module) is nn.BatchNorm1d:
        return GatheredBatchNorm1d.from_plain(module, collectives, context, by_slice=True)
    if is_row_wise(module):
        return _convert_row_wise(module, name, context)
    children = list(module.named_children())
    own = [f"its own parameter {n}" for n, _ in module.named_parameters(recurse=False)]
    own += [f"its own buffer {n}" for n, _ in module.named_buffers(recurse=False)]
    if own or not children:
        what = own[0] if own and children else "it"
        raise UnknownModuleError(
            f"train.virtual_ranks: {name} is a {type(module).__name__}, and {what} cannot be computed slice by slice: "
            "leave train.virtual_ranks null, or let the module declare row_wise = True if it treats each row by itself"
        )
    in_sequence = type(module) is nn.Sequential
    for child_name, child in children:
        if not (in_sequence and is_row_wise(child)):
            path = f"{name}.{child_name}" if name != "the model" else child_name
            setattr(module, child_name, _convert(child, path, context, collectives))
    if in_sequence:
        module.__class__ = SlicedSequential
        module.context = context  # type: ignore[assignment]
    return module


def _convert_row_wise(module: nn.Module, name: str, context: ModelContext) -> nn.Module:
    crossing = [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if crossing:
        raise UnknownModuleError(
            f"train.virtual_ranks: {name} declares row_wise = True, but its BatchNorm {crossing[0]} mixes rows"
        )
    # Without parameters there is no gradient to keep apart; that it copies or combines numbers elementwise, so that
    # rows side by side change no bit, is for `check_own_operations` to find out.
    return module if _only_moves_rows(module) else Sliced(module, context)


def _only_moves_rows(module: nn.Module) -> bool:
    own_kind = type(module) not in _ROW_WISE and is_row_wise(module)
    return own_kind and not list(module.parameters()) and all(map(_only_moves_rows, module.children()))


def require_world_size(virtual_ranks: int, world_size: int) -> None:
    """Check that the virtual ranks can be shared out evenly.

    Raises:
        UserError: they cannot; it lists the world sizes that work.
    """
    if virtual_ranks % world_size:
        sizes = [str(n) for n in range(1, virtual_ranks + 1) if virtual_ranks % n == 0]
        raise UserError(
            f"train.virtual_ranks={virtual_ranks} cannot be shared by {world_size} ranks; "
            f"it works on {', '.join(sizes[:-1])}{' or ' if sizes[:-1] else ''}{sizes[-1]}"
        )
