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

from dist_train.determinism.batch_norm import GatheredBatchNorm1d
from dist_train.determinism.sliced_modules import Sliced, SlicedSequential, UnknownModuleError

# Operations that move numbers.
_MOVING = {
    "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "arange", "cat", "chunk", "clone", "constant_pad_nd",
    "contiguous", "copy_", "detach", "embedding", "empty", "empty_like", "expand", "expand_as", "fill_", "flatten",
    "flip", "full", "full_like", "gather", "index", "index_put_", "index_select", "lift_fresh", "masked_fill",
    "masked_fill_", "movedim", "narrow", "new_empty", "new_full", "new_ones", "new_zeros", "one_hot", "ones",
    "ones_like", "permute", "repeat", "reshape", "resize_", "roll", "scatter", "scatter_", "select", "slice",
    "split", "split_with_sizes", "squeeze", "stack", "t", "take_along_dim", "to", "transpose", "unbind",
    "unsafe_split", "unsafe_view", "unsqueeze", "view", "where", "zero_", "zeros", "zeros_like",
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
    """Look at what a converted model computes outside of modules that are computed slice by slice.

    `inputs` are its arguments, each (rows, ...); `name` is what the message calls it.

    Raises:
        UnknownModuleError: an operation there may round a row in another way when other rows are beside it.
    """
    watch = _OwnOperations()
    was_training = model.training
    model.eval()
    with _marking(model, watch), torch.no_grad(), watch:
        model(*inputs)
    model.train(was_training)
    if watch.inexact:
        raise UnknownModuleError(
            f"train.virtual_ranks: the forward of {name} itself computes {', '.join(watch.inexact)}, which may round a "
            "row in another way when other rows are beside it: put it into a module that declares row_wise = True, "
            "or leave train.virtual_ranks null"
        )


class _OwnOperations(TorchDispatchMode):
    """Notes inexact operations outside of the modules that are marked; `depth` counts those that are being called."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.inexact: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not self.depth and name not in _EXACT:
            self.inexact[name] = None
        return func(*args, **(kwargs or {}))


@contextmanager
def _marking(model: nn.Module, watch: _OwnOperations) -> Iterator[None]:
    def enter(_module: nn.Module, _inputs: Any) -> None:
        watch.depth += 1

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        watch.depth -= 1

    handles: list[Callable[[], None]] = []
    for module in model.modules():
        if isinstance(module, (Sliced, SlicedSequential, GatheredBatchNorm1d)):
            handles.append(module.register_forward_pre_hook(enter).remove)
            handles.append(module.register_forward_hook(leave).remove)
    try:
        yield
    finally:
        for remove in handles:
            remove()
