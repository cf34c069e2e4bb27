"""What a container computes between its modules: in the exact mode only what rounds a row alike in any company.

A matrix product, a sum or an exponential may round a row in another way when other rows are computed beside it, since
kernels are chosen by shape. Modules are computed slice by slice, so they always see the same shapes; what a container's
`forward` does by itself sees all rows of a rank, and their number depends on the world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.determinism.batch_norm import GatheredBatchNorm1d
from dist_train.determinism.sliced_modules import Sliced, SlicedSequential, UnknownModuleError, is_row_wise

# Operations that move numbers.
_MOVING = {
    "_local_scalar_dense", "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "aminmax", "arange", "cat",
    "clone", "constant_pad_nd", "copy_", "detach", "embedding", "empty", "empty_like", "expand", "fill_", "flip",
    "full", "full_like", "gather", "index", "index_put_", "index_select", "lift_fresh", "masked_fill", "max", "min",
    "masked_fill_", "new_empty", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "permute", "repeat",
    "resize_", "roll", "scatter", "scatter_", "select", "slice", "split", "split_with_sizes", "squeeze", "stack",
    "t", "transpose", "unbind", "unsafe_split", "unsafe_view", "unsqueeze", "view", "where", "zero_", "zeros",
    "zeros_like",
}  # fmt: skip
# IEEE 754 rounds these correctly, one number at a time.
_ROUNDED_CORRECTLY = {
    "abs", "add", "add_", "bitwise_and", "bitwise_or", "ceil", "clamp", "clamp_", "clamp_max", "clamp_min", "div",
    "div_", "eq", "floor", "ge", "gt", "isfinite", "isinf", "isnan", "le", "logical_and", "logical_not",
    "logical_or", "lt", "maximum", "minimum", "mul", "mul_", "ne", "neg", "relu", "relu_", "round", "rsub", "sign",
    "sub", "sub_", "threshold", "trunc",
}  # fmt: skip
_EXACT = _MOVING | _ROUNDED_CORRECTLY


def check_own_operations(model: nn.Module, inputs: Sequence[Tensor], name: str) -> None:
    """Look at what a converted model computes in training outside of modules that are computed slice by slice.

    `inputs` are its arguments, each (rows, ...); `name` is what the message calls it. In evaluation every world size
    sees the same rows together, so what a container computes then is its own affair.

    Raises:
        UnknownModuleError: an operation there may round a row in another way when other rows are beside it, or reads a
            trainable parameter, whose gradient would be that of all slices of a rank together.
    """
    operations = _OwnOperations(model)
    with _containers_in_training(model), _counted_depth(model, operations), torch.no_grad(), operations:
        model(*inputs)
    if operations.inexact:
        raise UnknownModuleError(
            f"train.virtual_ranks: the forward of {name} itself computes {', '.join(operations.inexact)}, which may "
            "round a row in another way when other rows are beside it: put it into a module that declares "
            "row_wise = True, or leave train.virtual_ranks null"
        )
    if operations.parameters:
        raise UnknownModuleError(
            f"train.virtual_ranks: the forward of {name} itself uses the parameter {', '.join(operations.parameters)} "
            "of one of its modules: put that into a module that declares row_wise = True, or leave train.virtual_ranks "
            "null"
        )


class _OwnOperations(TorchDispatchMode):
    """Notes what is called outside of modules that are computed slice by slice.

    `inexact` are the names of operations, `parameters` those of trainable parameters. `depth` counts the modules
    computed slice by slice that are being called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.depth = 0
        self.inexact: dict[str, None] = {}
        self.parameters: dict[str, None] = {}
        self._trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not self.depth:
            if name not in _EXACT:
                self.inexact[name] = None
            read = [leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            # By memory: a view of a parameter is the parameter.
            self.parameters |= {
                n: None for n, p in self._trainable if any(0 <= at - p.data_ptr() < p.nbytes for at in read)
            }
        return func(*args, **(kwargs or {}))


def _slice_by_slice(model: nn.Module) -> list[nn.Module]:
    """The modules of a converted model that see one slice at a time, or gather what crosses slices in a fixed order.

    A SlicedSequential is a container like others: it takes runs of its row-wise modules through slice by slice.
    """
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (Sliced, GatheredBatchNorm1d)):
            found.append(module)
        elif isinstance(module, SlicedSequential):
            found += [child for child in module if is_row_wise(child)]
    return found


@contextmanager
def _containers_in_training(model: nn.Module) -> Iterator[None]:
    """Containers are in training mode; what is computed slice by slice, and BatchNorm, is in evaluation mode."""
    was_training = model.training
    model.eval()
    inside = {module for outer in _slice_by_slice(model) for module in outer.modules()}
    for module in model.modules():
        module.training = module not in inside
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _counted_depth(model: nn.Module, operations: _OwnOperations) -> Iterator[None]:
    def enter(_module: nn.Module, _inputs: Any) -> None:
        operations.depth += 1

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        operations.depth -= 1

    handles: list[Callable[[], None]] = []
    for module in _slice_by_slice(model):
        handles.append(module.register_forward_pre_hook(enter).remove)
        handles.append(module.register_forward_hook(leave).remove)
    try:
        yield
    finally:
        for remove in handles:
            remove()
