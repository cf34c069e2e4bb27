"""A multilayer perceptron as one node of autograd, worked through in blocks of rows that stay in the cache.

Autograd runs a dozen kernels a layer, each over the whole batch and each into new memory: at small batches their launch
is most of the time, at large ones the way to memory and back. Here forward and backward pass are written out, in
place, some hundred rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.models.batch_norm import GatheredBatchNorm1d, merged
from dist_train.models.dropout import KeyedDropout, keep_above
from dist_train.models.virtual_ranks import SlicedSequential
from dist_train.runtime.position import cut
from dist_train.runtime.slices import Slices

# Large enough that calls cost little, small enough that most of what a layer makes of a block stays in a core's cache;
# docs/log.md has what other sizes cost.
BLOCK_ROWS = 512


def fuse_sequences(model: nn.Module, slices: Slices) -> nn.Module:
    """Fuse each Sequential in a model that is (Linear, BatchNorm?, ReLU, dropout?) repeated, then Linear; in place.

    Its BatchNorm must be gathered and its dropout keyed by then, and `slices` must be told of each batch. Other modules
    stay as they are, and state_dict keys do not change.
    """
    for module in model.modules():
        layers = _layers_of(module) if type(module) in (nn.Sequential, SlicedSequential) else None
        if layers:
            module.__class__ = FusedSequential
            cast(FusedSequential, module).set_up(layers, slices)
    return model


class FusedSequential(nn.Sequential):
    """What nn.Sequential makes of the same modules, in training faster; in evaluation it is nn.Sequential.

    Shapes: (rows, features) -> (rows, outputs), float32 or float64, on the CPU. Masks of dropout are the same bits,
    other numbers agree to rounding. What a slice goes through depends on that slice alone, as the exact mode needs it.
    """

    def set_up(self, layers: Sequence[_Layer], slices: Slices) -> None:
        """What it consists of, and who knows which rows come next."""
        self.layers = layers
        self.runs = _runs(layers)
        self.slices = slices
        # Kept, since walking through the modules takes longer than a kernel.
        self.trained = tuple(p for p in self.parameters() if p.requires_grad)
        self._spare: _Work | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Outputs of the rows."""
        if not (self.training and torch.is_grad_enabled()):
            return cast(Tensor, super().forward(input))
        # Where gradients are kept aside, autograd need not know more than that there are some.
        parameters = self.trained[:1] if self.slices.gradients else self.trained
        return cast(Tensor, _Fused.apply(input, self, *parameters))

    def work_for(self, parts: Sequence[Tensor]) -> _Work:
        """Memory for slices of such lengths: that of the step before, unless the lengths differ or it is in use."""
        work, self._spare = self._spare, None
        lengths, dtype = [len(part) for part in parts], parts[0].dtype
        first = self.layers[0].linear.weight.data_ptr()  # parameters may have been moved
        if work is None or work.lengths != lengths or work.dtype != dtype or work.first_weight != first:
            work = _Work(lengths, self.layers, parts[0])
        return work

    def give_back(self, work: _Work) -> None:
        """The next step may have the memory."""
        self._spare = work


class _Layer(NamedTuple):
    """A Linear and what follows it up to the next one. The last has neither BatchNorm nor ReLU.

    `scale` is what dropout multiplies kept numbers by; the products that they enter do that on the way.
    """

    linear: nn.Linear
    norm: GatheredBatchNorm1d | None
    dropout: KeyedDropout | None
    scale: float


class _Block:
    """Some rows of one slice, and what each layer has made of them.

    `sums[i]` are the outputs of layer i's Linear, `hidden[i]` what BatchNorm, ReLU and dropout (not yet scaled) make
    of them; without BatchNorm both are the same memory. `room[i]`, of the same shape, is shared by all blocks.
    """

    def __init__(self, index: int, place: int, num_rows: int, layers: Sequence[_Layer], room: Sequence[Tensor]) -> None:
        self.slice = index
        self.place = place
        self.num_rows = num_rows
        self.room = [memory[:num_rows] for memory in room]
        self.sums = [torch.empty_like(memory) for memory in self.room]
        self.hidden = [torch.empty_like(s) if layer.norm else s for s, layer in zip(self.sums, layers, strict=True)]
        self.inputs = self.sums[0]

    def input_of(self, index: int) -> Tensor:
        """What layer `index` reads."""
        return self.hidden[index - 1] if index else self.inputs


class _Work:
    """The blocks of a pass, and what each BatchNorm knows of them."""

    def __init__(self, lengths: list[int], layers: Sequence[_Layer], like: Tensor) -> None:
        self.lengths = lengths
        self.dtype = like.dtype
        self.first_weight = layers[0].linear.weight.data_ptr()
        pieces = [cut(0, length, max(1, -(-length // BLOCK_ROWS))) for length in lengths]
        self._counts = [[b - a for a, b in of_slice] for of_slice in pieces]
        most = max(max(counts) for counts in self._counts)
        room = [like.new_empty((most, layer.linear.out_features)) for layer in layers]
        starts = np.cumsum([0, *lengths]).tolist()
        self.blocks = [
            _Block(index, start + a, b - a, layers, room)
            for index, (start, of_slice) in enumerate(zip(starts, pieces, strict=False))
            for a, b in of_slice
        ]
        self.norms = {
            index: _Norm(layer.norm, index, self.blocks, self.dtype) for index, layer in enumerate(layers) if layer.norm
        }

    def fill(self, inputs: Sequence[Tensor]) -> None:
        """Hand each slice's rows to its blocks."""
        for block, rows in zip(self.blocks, self.pieces(inputs), strict=True):
            block.inputs = rows

    def pieces(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Rows of each slice, cut as the blocks are."""
        if len(slices) == len(self.blocks):
            return list(slices)
        return [piece for rows, counts in zip(slices, self._counts, strict=True) for piece in rows.split(counts)]


class _Norm:
    """A BatchNorm over the blocks of a pass: what normalises a block, and what its gradient is multiplied by.

    Its arithmetic is on a few numbers for each feature, in float64, and by numpy, which takes a third of the time that
    torch does for that little.
    """

    def __init__(self, norm: GatheredBatchNorm1d, index: int, blocks: Sequence[_Block], dtype: torch.dtype) -> None:
        self._norm = norm
        self._index = index
        self._blocks = blocks
        self._slice_of = [block.slice for block in blocks]
        features, num_slices = norm.num_features, blocks[-1].slice + 1
        self._of_blocks = np.zeros((len(blocks), 3, features))
        self._of_blocks[:, 0] = np.array([[block.num_rows] for block in blocks])
        # With one block a slice they are the same.
        self._of_slices = self._of_blocks if len(blocks) == num_slices else np.zeros((num_slices, 3, features))
        self._sums = np.zeros((num_slices, 2, features))
        self._sums_of = list(self._sums)
        self._wide = torch.empty((max(block.num_rows for block in blocks), features), dtype=torch.float64)
        # What blocks are multiplied by and added to is in their own type: tensors, and numpy's view of the same memory.
        self.shift, self.scale, self.constant, self.of_sum = factors = torch.zeros((4, features), dtype=dtype).unbind()
        self._shift, self._scale, self._constant, self._of_sum = (factor.numpy() for factor in factors)
        self._weight, self._bias = (p if p is None else p.detach().numpy() for p in (norm.weight, norm.bias))

    def prepare(self) -> None:
        """All blocks are there: find what `normalise` needs, over all rows of all ranks."""
        norm = self._norm
        for block, of_block in zip(self._blocks, self._of_blocks, strict=True):
            if block.num_rows:
                # torch's own kernel for the statistics of a BatchNorm: var_mean takes ten times as long. In float64, so
                # that world sizes, whose blocks differ, round to the same scale and shift: see models/batch_norm.py.
                wide = self._wide[: block.num_rows].copy_(block.sums[self._index])
                mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
                of_block[1], of_block[2] = mean.numpy(), var.numpy()
        if self._of_slices is not self._of_blocks:
            for index, of_slice in enumerate(self._of_slices):
                of_slice[:] = merged(self._of_blocks[np.equal(self._slice_of, index)])
        counts, self._mean, var = merged(norm.collectives.slices(torch.from_numpy(self._of_slices)).numpy())
        self._count = norm.require_rows(counts[0])
        norm.follow(self._mean, var, self._count)
        self._inverse_std = 1 / np.sqrt(var + norm.eps)
        self._wide_scale = self._inverse_std if self._weight is None else self._inverse_std * self._weight
        self._scale[:] = self._wide_scale
        np.multiply(self._mean, -self._wide_scale, out=self._shift, casting="same_kind")
        if self._bias is not None:
            self._shift += self._bias
        self._sums.fill(0)

    def normalise(self, block: _Block) -> None:
        """From a block's sums to what ReLU is given."""
        torch.addcmul(self.shift, block.sums[self._index], self.scale, out=block.hidden[self._index])

    def count(self, block: _Block, gradient: Tensor) -> None:
        """Add up, over the rows of a block, the gradient of what is normalised, and gradient * sum."""
        sums = self._sums_of[block.slice]
        sums[0] += gradient.sum(0).numpy()
        sums[1] += torch.mul(gradient, block.sums[self._index], out=block.room[self._index]).sum(0).numpy()

    def finish(self, found: Sequence[dict[nn.Parameter, Tensor]]) -> None:
        """All blocks are counted: leave the gradients of weight and bias, and find what `propagate` needs.

        Ioffe and Szegedy (2015, "Batch normalization"), sorted by what multiplies a row's sum and its gradient.
        """
        norm, sums = self._norm, self._sums
        sums[:, 1] = (sums[:, 1] - sums[:, 0] * self._mean) * self._inverse_std  # now of gradient * normalised sum
        if norm.weight is not None:
            for of_slice, (gradients, products) in zip(found, sums, strict=True):
                for parameter, part in ((norm.bias, gradients), (norm.weight, products)):
                    view = of_slice[parameter].numpy()
                    view += part
        constant, of_sum = norm.collectives.fold(torch.from_numpy(sums)).numpy() * (self._wide_scale / -self._count)
        of_sum *= self._inverse_std
        self._of_sum[:] = of_sum
        self._constant[:] = constant - of_sum * self._mean

    def propagate(self, block: _Block, gradient: Tensor) -> Tensor:
        """From the gradient of what is normalised to that of the block's sums, which it takes the place of."""
        sums = block.sums[self._index]
        return torch.addcmul(self.constant, sums, self.of_sum, out=sums).addcmul_(gradient, self.scale)


class _Fused(torch.autograd.Function):
    """Forward: a run of layers block by block, up to the next BatchNorm, whose statistics all blocks wait for.

    Backward: the same from behind.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: FusedSequential, *_parameters: nn.Parameter) -> Tensor:
        layers, slices = sequence.layers, sequence.slices
        parts = slices.split(x)
        work = sequence.work_for(parts)
        work.fill(parts)
        for first, last in sequence.runs:
            for block in work.blocks:
                slices.go_to(block.place)
                for index in range(first, last + 1):
                    if index:
                        _activate(block, index - 1, layers[index - 1], work)
                    _multiply(block, index, layers)
            if last in work.norms:
                work.norms[last].prepare()
        ctx.sequence, ctx.work = sequence, work
        return torch.cat([block.sums[-1] for block in work.blocks])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sequence, work, wants_input = ctx.sequence, ctx.work, ctx.needs_input_grad[0]
        layers, slices, norms = sequence.layers, sequence.slices, work.norms
        found = slices.gradients or [{p: torch.zeros_like(p) for p in sequence.trained}]
        flow = work.pieces(slices.split(grad))  # the gradient of what comes out of a layer, for each block
        for first, last in reversed(sequence.runs):
            for number in reversed(range(len(work.blocks))):
                block, gradient = work.blocks[number], flow[number]
                if last in norms:
                    gradient = norms[last].propagate(block, gradient)
                for index in range(last, first - 1, -1):
                    _collect(block, index, gradient, layers, found[block.slice])
                    if index:
                        gradient = _propagate(block, index, gradient, layers)
                    elif wants_input:
                        gradient = gradient @ layers[0].linear.weight
                if first:
                    norms[first - 1].count(block, gradient)
                flow[number] = gradient
            if first:
                norms[first - 1].finish(found)
        sequence.give_back(work)
        left = [None] if slices.gradients else [found[0][p] for p in sequence.trained]
        return torch.cat(flow) if wants_input else None, None, *left


def _multiply(block: _Block, index: int, layers: Sequence[_Layer]) -> None:
    """A block through the Linear of a layer."""
    linear, alpha = layers[index].linear, layers[index - 1].scale if index else 1.0
    source, weight, out = block.input_of(index), linear.weight.t(), block.sums[index]
    if linear.bias is None:
        out.addmm_(source, weight, beta=0, alpha=alpha)
    else:
        torch.addmm(linear.bias, source, weight, alpha=alpha, out=out)


def _activate(block: _Block, index: int, layer: _Layer, work: _Work) -> None:
    """A block through what follows a Linear."""
    if layer.norm:
        work.norms[index].normalise(block)
    hidden = block.hidden[index].clamp_min_(0)
    if layer.dropout:
        layer.dropout.mask_(hidden, block.room[index])


def _collect(
    block: _Block, index: int, gradient: Tensor, layers: Sequence[_Layer], found: Mapping[Any, Tensor]
) -> None:
    """Add what a block contributes to the gradients of a layer's Linear."""
    linear, alpha = layers[index].linear, layers[index - 1].scale if index else 1.0
    if linear.weight.requires_grad:
        found[linear.weight].addmm_(gradient.t(), block.input_of(index), alpha=alpha)
    # BatchNorm subtracts the bias again: its gradient is zero.
    if linear.bias is not None and linear.bias.requires_grad and not layers[index].norm:
        found[linear.bias].add_(gradient.sum(0))


def _propagate(block: _Block, index: int, gradient: Tensor, layers: Sequence[_Layer]) -> Tensor:
    """From the gradient of layer `index`'s outputs to that of what ReLU and dropout of the layer before were given.

    What came through both is greater than 0, all else is 0, so the layer's result is the mask of both; it is needed no
    more and makes room for the gradient.
    """
    mask, room = block.hidden[index - 1], block.room[index - 1]
    room.addmm_(gradient, layers[index].linear.weight, beta=0, alpha=layers[index - 1].scale)
    return keep_above(room, mask, 0, out=mask)


def _runs(layers: Sequence[_Layer]) -> list[tuple[int, int]]:
    """First and last layer of each run that ends with a BatchNorm to come, or with the last layer."""
    ends = [index for index, layer in enumerate(layers) if layer.norm or index == len(layers) - 1]
    return [(before + 1, end) for before, end in pairwise([-1, *ends])]


def _layers_of(sequence: nn.Module) -> list[_Layer] | None:
    """The layers of a sequence; None when it is not such a one."""
    modules = list(sequence.children())
    layers: list[_Layer] = []
    while modules and type(modules[0]) is nn.Linear:
        linear = cast(nn.Linear, modules.pop(0))
        if not modules:
            return [*layers, _Layer(linear, None, None, 1.0)]
        norm = modules.pop(0) if isinstance(modules[0], GatheredBatchNorm1d) else None
        if not modules or type(modules.pop(0)) is not nn.ReLU:
            return None
        dropout = modules.pop(0) if modules and isinstance(modules[0], KeyedDropout) else None
        scale = dropout.scale if isinstance(dropout, KeyedDropout) else 1.0
        layers.append(_Layer(linear, cast(Any, norm), cast(Any, dropout), scale))
    return None
