"""Multilayer perceptrons that share weights up to factors (BatchEnsemble) as one node of autograd, block by block.

The authors' modules scale activations of every member before and after the shared product: four passes over
(rows, members, units) for each layer, and an autograd node for each. Here the factors go into the weights: a member
multiplies by weight[o, i] * s[o] * r[i], made once for each pass. The first layer, whose input the members share, is
then one wide product, later layers are one batched product, and between two products is one compiled pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_train.accel import ensemble_kernels as kernels
from dist_train.determinism.arithmetic import Arithmetic, written_out
from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.dropout import KeyedDropout
from dist_train.determinism.position import split_evenly

# So that what a layer makes of a block stays in the cache beside the weights of the members.
BLOCK_ROWS = 256


class Layer(NamedTuple):
    """A LinearBatchEnsemble and what follows it; `input_scale` is that of the dropout before it."""

    linear: Any
    dropout: KeyedDropout
    input_scale: float


def fuse_ensembles(model: nn.Module, context: ModelContext) -> nn.Module:
    """Fuse each module that is `output(backbone(x))` of the package tabm for members with shared weights; in place.

    Such a module declares `fusible_members = True`. Its dropout must be keyed by then, and each pass in training needs
    a bound batch. Other modules stay as they are, and state_dict keys do not change.
    """
    tabm = sys.modules.get("tabm")
    for module in model.modules():
        layers = _layers_of(module, tabm) if tabm and getattr(module, "fusible_members", False) is True else None
        if layers:
            plain_forward = type(module).forward
            module.__class__ = FusedMembers
            cast(FusedMembers, module).set_up(layers, context, plain_forward)
    return model


class FusedMembers(nn.Module):
    """What the plain module makes of the same rows, in training faster; in evaluation it is the plain module.

    Shapes: (rows, features) -> (rows, members, classes), float32 or float64, on the CPU. Masks of dropout are the same
    bits, other numbers agree to rounding.
    """

    def set_up(
        self, layers: Sequence[Layer], context: ModelContext, plain_forward: Callable[[Any, Tensor], Tensor]
    ) -> None:
        """Take over `layers`; `plain_forward` computes inputs that this one is not made for."""
        self.layers = layers
        self.context = context
        self.plain_forward = plain_forward
        self.trained = [p for layer in layers for p in _parameters_of(layer)]
        output = cast(Any, self.output)
        self.trained += [output.weight, output.bias]
        self._spare: dict[bool, Workspace] = {}  # one for each place of `context.elsewhere`

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the members."""
        if not (self.training and torch.is_grad_enabled() and self._takes(x)):
            return self.plain_forward(self, x)
        return cast(Tensor, _Members.apply(x, self, *self.trained))

    def _takes(self, x: Tensor) -> bool:
        known = x.ndim == 2 and len(x) > 0 and x.dtype == self.trained[0].dtype and x.device.type == "cpu"
        return known and not torch.is_autocast_enabled("cpu") and all(p.requires_grad for p in self.trained)

    def work_for(self, x: Tensor) -> Workspace:
        """Memory for so many rows: that of the pass before, unless that is in use or of another size."""
        workspace = self._spare.pop(self.context.elsewhere, None)
        if workspace is None or workspace.num_rows != len(x) or workspace.dtype != x.dtype:
            workspace = Workspace(len(x), self.layers, x)
        return workspace

    def give_back(self, workspace: Workspace) -> None:
        """The next pass may have the memory."""
        self._spare[self.context.elsewhere] = workspace


class Block:
    """Some rows, and what each layer has made of them; in the backward pass, its gradient.

    `activations[0]` is (rows, members * units), later ones are (members, rows, units); `sources[i]` is what layer
    i + 1 reads, (members, rows, units).
    """

    def __init__(self, begin: int, end: int, layers: Sequence[Layer], like: Tensor) -> None:
        self.begin, self.end, self.rows = begin, end, slice(begin, end)
        num_rows, members = end - begin, layers[0].linear.k
        first, *later = [layer.linear.out_features for layer in layers]
        self.activations = [like.new_empty((num_rows, members * first))]
        self.activations += [like.new_empty((members, num_rows, units)) for units in later]
        self.first = self.activations[0].view(num_rows, members, first)
        self.sources = [self.first.transpose(0, 1), *self.activations[1:]]
        self.arrays = [activations.numpy() for activations in self.activations]
        self.gradients = [like.new_empty(0)] * len(layers)


class Workspace:
    """The blocks of a pass, the weights of the members, and their gradients."""

    def __init__(self, num_rows: int, layers: Sequence[Layer], like: Tensor) -> None:
        self.num_rows, self.dtype = num_rows, like.dtype
        members = layers[0].linear.k
        pieces = split_evenly(0, num_rows, max(1, -(-num_rows // BLOCK_ROWS)))
        self.blocks = [Block(begin, end, layers, like) for begin, end in pieces]
        most = max(end - begin for begin, end in pieces)
        shapes = [(members, layer.linear.out_features, layer.linear.in_features) for layer in layers]
        self.weights = [like.new_empty(shape) for shape in shapes]
        self.of_weights = [like.new_empty(shape) for shape in shapes]
        scratch = [like.new_empty(members * most * shape[1]) for shape in shapes]
        for block, (begin, end) in zip(self.blocks, pieces, strict=True):
            block.gradients = [
                memory[: members * (end - begin) * shape[1]].view(members, end - begin, shape[1])
                for memory, shape in zip(scratch, shapes, strict=True)
            ]
        # The first layer's products are wide ones: (members * units, features).
        self.wide, self.of_wide = (w[0].view(-1, shapes[0][2]) for w in (self.weights, self.of_weights))
        self.totals = [np.zeros(shape[:2]) for shape in shapes]


class _Members(torch.autograd.Function):
    """All blocks forward, then all of them backward."""

    @staticmethod
    @written_out
    def forward(ctx: Any, x: Tensor, module: FusedMembers, *parameters: Tensor) -> Tensor:
        work, layers = module.work_for(x), module.layers
        for layer, weights in zip(layers, work.weights, strict=True):
            kernels.weights_of_members(*_factors_of(layer), layer.input_scale, weights.numpy())
        (weight, bias), arithmetic = parameters[-2:], module.context.arithmetic
        logits = x.new_empty((len(x), len(weight), weight.shape[2]))
        for block in work.blocks:
            for index, layer in enumerate(layers):
                if index:
                    weights = work.weights[index].transpose(1, 2)
                    arithmetic.multiply(block.sources[index - 1], weights, block.activations[index])
                else:
                    arithmetic.multiply(x[block.rows], work.wide.t(), block.activations[0])
                _activate(block, index, layer)
            of_block = bias.detach().unsqueeze(1).repeat(1, block.end - block.begin, 1)
            arithmetic.add(block.sources[-1], weight.detach(), of_block, layers[-1].dropout.scale)
            logits[block.rows] = of_block.transpose(0, 1)
        ctx.module, ctx.work, ctx.parameters = module, work, parameters
        ctx.save_for_backward(x)
        return logits

    @staticmethod
    @once_differentiable
    @written_out
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), module, work = ctx.saved_tensors, ctx.module, ctx.work
        layers, (weight, bias), arithmetic = module.layers, ctx.parameters[-2:], module.context.arithmetic
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_output = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for totals in work.totals:
            totals.fill(0)
        for number, block in enumerate(work.blocks):
            sum_up = arithmetic.add if number else arithmetic.multiply  # the first block begins the sums
            _output_backward(block, grad[block.rows], weight, of_output, layers[-1].dropout.scale, arithmetic)
            for index in range(len(layers) - 1, 0, -1):
                kernels.relu_dropout_backward_of_members(
                    block.gradients[index].numpy(), block.arrays[index], False, work.totals[index]
                )
                gradient = block.activations[index]
                sum_up(gradient.transpose(1, 2), block.sources[index - 1], work.of_weights[index])
                arithmetic.multiply(gradient, work.weights[index], block.gradients[index - 1])
            kernels.relu_dropout_backward_of_members(
                block.gradients[0].numpy(), block.first.numpy(), True, work.totals[0]
            )
            sum_up(block.activations[0].t(), x[block.rows], work.of_wide)
            if of_x is not None:
                arithmetic.multiply(block.activations[0], work.wide, of_x[block.rows])
        found = [g for index, layer in enumerate(layers) for g in _gradients_of(layer, index, work)]
        module.give_back(work)
        return of_x, None, *found, *of_output


def _activate(block: Block, index: int, layer: Layer) -> None:
    """Bias, ReLU and dropout of a block."""
    linear, dropout = layer.linear, layer.dropout
    width = linear.k * linear.out_features
    start = int(dropout.context.counter_for(dropout.purpose, width, block.begin))
    bias = linear.bias.detach().numpy()
    if index:
        kernels.bias_relu_dropout_of_members(block.arrays[index], bias, start, dropout.threshold)
    else:
        kernels.bias_relu_dropout(block.arrays[0], bias.reshape(-1), start, dropout.threshold)


def _output_backward(
    block: Block, grad: Tensor, weight: Tensor, found: Sequence[Tensor], scale: float, arithmetic: Arithmetic
) -> None:
    """Add what a block contributes to the gradients of the last Linear, and find that of what it has read."""
    gradient = grad.transpose(0, 1).contiguous()
    arithmetic.add(block.sources[-1].transpose(1, 2), gradient, found[0], scale)
    kernels.add_rows_of_members(found[1].numpy(), gradient.numpy())
    arithmetic.multiply(gradient, weight.transpose(1, 2), block.gradients[-1], scale)


def _gradients_of(layer: Layer, index: int, work: Workspace) -> list[Tensor]:
    """Gradients of weight, factors and bias of a layer, from those of the weights of its members."""
    linear = layer.linear
    found = [torch.zeros_like(p) for p in (linear.weight, linear.r, linear.s)]
    kernels.weights_of_members_backward(
        work.of_weights[index].numpy(), *_factors_of(layer), layer.input_scale, *(g.numpy() for g in found)
    )
    return [*found, torch.from_numpy(work.totals[index]).to(work.dtype)]


def _factors_of(layer: Layer) -> tuple[Any, Any, Any]:
    weight, r, s, _ = _parameters_of(layer)
    return weight.detach().numpy(), r.detach().numpy(), s.detach().numpy()


def _parameters_of(layer: Layer) -> list[nn.Parameter]:
    linear = layer.linear
    return [linear.weight, linear.r, linear.s, linear.bias]


def _layers_of(module: nn.Module, tabm: Any) -> list[Layer] | None:
    """The layers of a module; None when its backbone is not one of members with shared weights."""
    backbone, output = module.get_submodule("backbone"), cast(Any, module.get_submodule("output"))
    if type(backbone) is not tabm.MLPBackboneBatchEnsemble or type(output) is not tabm.LinearEnsemble:
        return None
    layers: list[Layer] = []
    scale = 1.0
    for block in cast(Any, backbone).blocks:
        linear, activation, dropout = block
        kinds = (type(linear), type(activation), type(dropout))
        if kinds != (tabm.LinearBatchEnsemble, nn.ReLU, KeyedDropout) or linear.bias is None or output.bias is None:
            return None
        layers.append(Layer(linear, dropout, scale))
        scale = dropout.scale
    return layers
