"""A multilayer perceptron as one node of autograd, worked through in blocks of rows that stay in the cache.

Autograd runs a dozen kernels a layer, each over the whole batch and each into new memory: at small batches their launch
is most of the time, at large ones the way to memory and back. Here forward and backward pass are written out, in
place, some hundred rows at a time: torch's matrix products, and between two of them one compiled pass over the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_train.accel.cpu_layers import Block, Gradients, Layer, Workspace
from dist_train.determinism.arithmetic import Arithmetic
from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.batch_norm import GatheredBatchNorm1d
from dist_train.determinism.dropout import KeyedDropout
from dist_train.determinism.sliced_modules import SlicedSequential
from dist_train.determinism.slices import split_slices


def fuse_sequences(model: nn.Module, context: ModelContext) -> nn.Module:
    """Fuse each Sequential in a model that is (Linear, BatchNorm?, ReLU, dropout?) repeated, then Linear; in place.

    Its BatchNorm must be gathered and its dropout keyed by then. `context.gradients` must be there by the first pass in
    training, and each pass needs a bound batch. Other modules stay as they are, and state_dict keys do not change.
    """
    for module in model.modules():
        layers = _layers_of(module) if type(module) in (nn.Sequential, SlicedSequential) else None
        if layers:
            plain_forward = type(module).forward
            module.__class__ = FusedSequential
            cast(FusedSequential, module).set_up(layers, context, plain_forward)
    return model


class FusedSequential(nn.Sequential):
    """What nn.Sequential makes of the same modules, in training faster; in evaluation it is nn.Sequential.

    Shapes: (rows, features) -> (rows, outputs), float32 or float64, on the CPU. Masks of dropout are the same bits,
    other numbers agree to rounding. What a slice goes through depends on that slice alone, as the exact mode needs it.
    """

    def set_up(
        self, layers: Sequence[Layer], context: ModelContext, plain_forward: Callable[[Any, Tensor], Tensor]
    ) -> None:
        """Take over a sequence of `layers`; `plain_forward` computes inputs that this one is not made for."""
        self.layers = layers
        self.runs = _runs(layers)
        self.context = context
        self.plain_forward = plain_forward
        # Kept, since walking through the modules takes longer than a kernel.
        self.trained = tuple(p for p in self.parameters() if p.requires_grad)
        # One for each place of `context.elsewhere`; setting an attribute of a module takes as long as a kernel.
        self._spare: dict[bool, Workspace] = {}

    def forward(self, input: Tensor) -> Tensor:
        """Outputs of the rows."""
        if not (self.training and torch.is_grad_enabled() and self._takes(input)):
            return self.plain_forward(self, input)
        # Autograd gets no gradient for these inputs. One parameter is enough for the output to require a gradient.
        parameters = self.trained if self.context.visit_all_parameters else self.trained[:1]
        return cast(Tensor, _Fused.apply(input, self, *parameters))

    def _takes(self, input: Tensor) -> bool:
        """Whether rows are of the shape and type that the compiled passes are made for."""
        known = input.ndim == 2 and input.dtype == self.layers[0].linear.weight.dtype
        return known and not torch.is_autocast_enabled("cpu")

    def work_for(self, parts: Sequence[Tensor]) -> Workspace:
        """Memory for slices of such lengths: that of the step before, unless the lengths differ or it is in use."""
        lengths, dtype = [len(part) for part in parts], parts[0].dtype
        first = self.layers[0].linear.weight.data_ptr()  # parameters may have been moved
        workspace = self._spare.pop(self.context.elsewhere, None)
        if (
            workspace is None
            or workspace.lengths != lengths
            or workspace.dtype != dtype
            or workspace.first_weight != first
        ):
            workspace = Workspace(lengths, self.layers, parts[0], self.context.gradients or [])
        return workspace

    def give_back(self, workspace: Workspace) -> None:
        """The next step may have the memory."""
        self._spare[self.context.elsewhere] = workspace


class _Fused(torch.autograd.Function):
    """Forward: a run of layers block by block, up to the next BatchNorm, whose statistics all blocks wait for.

    Backward: the same from behind.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: FusedSequential, *_parameters: nn.Parameter) -> Tensor:
        lengths = sequence.context.batch.slices
        parts = split_slices(x, lengths)
        workspace = sequence.work_for(parts)
        workspace.fill(parts)
        arithmetic = sequence.context.arithmetic
        for first, last in sequence.runs:
            for block in workspace.blocks:
                for index in range(first, last + 1):
                    if index:
                        workspace.between[index - 1].affine_relu_dropout(block)
                    _multiply(block, index, sequence.layers[index], workspace, arithmetic)
                if last < len(workspace.between):
                    workspace.between[last].batch_norm_stats(block)
            if last < len(workspace.between):
                workspace.between[last].prepare()
        ctx.sequence, ctx.workspace, ctx.lengths = sequence, workspace, lengths
        return torch.cat([block.pre_activations[-1].tensor for block in workspace.blocks])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sequence, workspace, wants_input = ctx.sequence, ctx.workspace, ctx.needs_input_grad[0]
        layers, between = sequence.layers, workspace.between
        found, arithmetic = workspace.gradients, sequence.context.arithmetic
        for block, of_outputs in zip(workspace.blocks, workspace.pieces(split_slices(grad, ctx.lengths)), strict=True):
            block.activations[-1].tensor.copy_(of_outputs)
        of_inputs: list[Tensor] = []
        for first, last in reversed(sequence.runs):
            for block in reversed(workspace.blocks):
                if last < len(between):
                    between[last].batch_norm_backward_elemt(block)
                for index in range(last, first - 1, -1):
                    _weight_gradient(block, index, layers[index], found[block.slice], arithmetic)
                    if index:
                        _input_gradient(block, index, layers[index], arithmetic)
                        between[index - 1].relu_dropout_backward(block)
                    elif wants_input:
                        of_inputs.append(_gradient_of_inputs(block, layers[0], arithmetic))
            for index in range(max(first - 1, 0), last):
                between[index].finish(found)
        sequence.give_back(workspace)
        nothing = [None] * (len(ctx.needs_input_grad) - 2)
        return torch.cat(of_inputs[::-1]) if wants_input else None, None, *nothing


def _multiply(block: Block, index: int, layer: Layer, workspace: Workspace, arithmetic: Arithmetic) -> None:
    """A block through the product of a layer; what follows it adds the bias, and nothing follows the last."""
    bias, factor = layer.linear.bias, layer.input_scale
    source, weight, out = (
        block.input_of(index),
        workspace.transposed_weights[index],
        block.pre_activations[index].tensor,
    )
    if bias is None or index < len(workspace.between):
        arithmetic.multiply(source, weight, out, factor)
    else:
        arithmetic.add(source, weight, out.copy_(bias), factor)


def _weight_gradient(block: Block, index: int, layer: Layer, found: Gradients, arithmetic: Arithmetic) -> None:
    """Add what a block contributes to the gradients of a layer's Linear."""
    weight, gradient = layer.linear.weight, block.activations[index]
    if weight.requires_grad:
        arithmetic.add(gradient.transposed, block.input_of(index), found.tensors[weight], layer.input_scale)
    # What follows a product finds the gradient of its bias; nothing follows the last.
    if index == len(block.activations) - 1:
        found.add_rows(layer.linear.bias, gradient.array)


def _input_gradient(block: Block, index: int, layer: Layer, arithmetic: Arithmetic) -> None:
    """From the gradient of a layer's sums to that of what it has read, in the `scratch` of the layer before."""
    scratch, gradient = block.scratch[index - 1].tensor, block.activations[index].tensor
    arithmetic.multiply(gradient, layer.linear.weight, scratch, layer.input_scale)


def _gradient_of_inputs(block: Block, layer: Layer, arithmetic: Arithmetic) -> Tensor:
    """That of the rows which the sequence was given."""
    found = torch.empty_like(block.inputs)
    arithmetic.multiply(block.activations[0].tensor, layer.linear.weight, found)
    return found


def _runs(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """First and last layer of each run that ends with a BatchNorm to come, or with the last layer."""
    ends = [index for index, layer in enumerate(layers) if layer.norm or index == len(layers) - 1]
    return [(before + 1, end) for before, end in pairwise([-1, *ends])]


def _layers_of(sequence: nn.Module) -> list[Layer] | None:
    """The layers of a sequence; None when it is not such a one."""
    modules = list(sequence.children())
    layers: list[Layer] = []
    scale = 1.0
    while modules and type(modules[0]) is nn.Linear:
        linear = cast(nn.Linear, modules.pop(0))
        if not modules:
            return [*layers, Layer(linear, scale, None, None)]
        norm = modules.pop(0) if isinstance(modules[0], GatheredBatchNorm1d) else None
        if not modules or type(modules.pop(0)) is not nn.ReLU:
            return None
        dropout = modules.pop(0) if modules and isinstance(modules[0], KeyedDropout) else None
        layers.append(Layer(linear, scale, cast(Any, norm), cast(Any, dropout)))
        scale = dropout.scale if isinstance(dropout, KeyedDropout) else 1.0
    return None
