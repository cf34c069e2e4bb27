"""What a fused network is made of: its layers, blocks of rows, and what lies between two matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.accel import cpu_kernels
from dist_train.determinism.batch_norm import GatheredBatchNorm1d
from dist_train.determinism.dropout import NOTHING_DROPPED, KeyedDropout
from dist_train.determinism.position import split_evenly

# Large enough that calls cost little, small enough that most of what a layer makes of a block stays in a core's cache;
# docs/log.md has what other sizes cost.
BLOCK_ROWS = 512


class Layer(NamedTuple):
    """A Linear and what follows it up to the next one. The last has neither BatchNorm nor ReLU.

    `input_scale` is what dropout before it multiplies kept numbers by; its products do that on the way.
    """

    linear: nn.Linear
    input_scale: float
    norm: GatheredBatchNorm1d | None
    dropout: KeyedDropout | None


class BlockViews:
    """Numbers of a block, (rows, features), in the ways in which they are looked at: making a view takes a while."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.transposed = tensor.t()
        self.array = tensor.numpy()


class Gradients:
    """The gradients of a slice, by parameter."""

    def __init__(self, tensors: Mapping[Any, Tensor]) -> None:
        self.tensors = tensors
        self._arrays: dict[Any, Any] = {parameter: tensor.numpy() for parameter, tensor in tensors.items()}

    def add(self, parameter: Tensor | None, totals: Any) -> None:
        """Add totals, (features,), to the gradient of a parameter, if that is wanted."""
        array = self._arrays.get(parameter)
        if array is not None:
            cpu_kernels.add(array, totals)

    def add_rows(self, parameter: Tensor | None, rows: Any) -> None:
        """Add the sum of rows, (rows, features), to the gradient of a parameter, if that is wanted."""
        array = self._arrays.get(parameter)
        if array is not None:
            cpu_kernels.add_rows(array, rows)


class Block:
    """Some rows of one slice, and what each layer has made of them.

    `pre_activations[i]`: outputs of layer i's Linear, without its bias but for the last layer. `activations[i]`: these
    after bias, BatchNorm, ReLU and dropout (not yet scaled); in the backward pass, their gradient. `scratch[i]` has the
    same shape and is shared by all blocks.
    """

    def __init__(self, index: int, place: int, num_rows: int, scratch: Sequence[Tensor]) -> None:
        self.slice = index
        self.place = place
        self.num_rows = num_rows
        self.scratch = [BlockViews(memory[:num_rows]) for memory in scratch]
        self.pre_activations = [BlockViews(torch.empty_like(r.tensor)) for r in self.scratch]
        self.activations = [BlockViews(torch.empty_like(r.tensor)) for r in self.scratch]
        self.inputs = torch.empty(0)

    def input_of(self, index: int) -> Tensor:
        """What layer `index` reads."""
        return self.activations[index - 1].tensor if index else self.inputs


class Workspace:
    """The blocks of a pass, and what follows each Linear but the last."""

    def __init__(
        self,
        lengths: list[int],
        layers: Sequence[Layer],
        like: Tensor,
        gradients: Sequence[Mapping[nn.Parameter, Tensor]],
    ) -> None:
        self.gradients = [Gradients(of_slice) for of_slice in gradients]
        self.lengths = lengths
        self.dtype = like.dtype
        self.first_weight = layers[0].linear.weight.data_ptr()
        self.transposed_weights = [layer.linear.weight.detach().t() for layer in layers]
        pieces = [split_evenly(0, length, max(1, -(-length // BLOCK_ROWS))) for length in lengths]
        self._counts = [[b - a for a, b in of_slice] for of_slice in pieces]
        most = max(max(counts) for counts in self._counts)
        scratch = [like.new_empty((most, layer.linear.out_features)) for layer in layers]
        starts = np.cumsum([0, *lengths]).tolist()
        self.blocks = [
            Block(index, start + a, b - a, scratch)
            for index, (start, of_slice) in enumerate(zip(starts, pieces, strict=False))
            for a, b in of_slice
        ]
        self.between = [
            (Normalised if layer.norm else Activation)(layer, index, self.blocks)
            for index, layer in enumerate(layers[:-1])
        ]

    def fill(self, inputs: Sequence[Tensor]) -> None:
        """Hand each slice's rows to its blocks."""
        for block, rows in zip(self.blocks, self.pieces(inputs), strict=True):
            block.inputs = rows

    def pieces(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Rows of each slice, cut as the blocks are."""
        if len(slices) == len(self.blocks):
            return list(slices)
        return [piece for rows, counts in zip(slices, self._counts, strict=True) for piece in rows.split(counts)]


class Activation:
    """What is between two matrix products, over the blocks of a pass: the Linear's bias, ReLU and dropout."""

    def __init__(self, layer: Layer, index: int, blocks: Sequence[Block]) -> None:
        self._layer = layer
        self._index = index
        self._threshold = layer.dropout.threshold if layer.dropout else NOTHING_DROPPED
        features, num_slices = layer.linear.out_features, blocks[-1].slice + 1
        dtype = blocks[0].pre_activations[index].array.dtype
        bias = layer.linear.bias
        self._added = np.zeros(features, dtype) if bias is None else bias.detach().numpy()
        self._scale, self._shift = np.ones(features, dtype), self._added
        # Of each slice, over its rows: the gradient of what ReLU is given, and its product with the Linear's sums.
        self._totals = np.zeros((num_slices, 2, features))
        self._totals_of = list(self._totals)

    def batch_norm_stats(self, block: Block) -> None:
        """The sums of a block are there."""

    def prepare(self) -> None:
        """Those of all blocks are there."""

    def affine_relu_dropout(self, block: Block) -> None:
        """From a block's sums to what the next Linear reads."""
        dropout, pre_activations = self._layer.dropout, block.pre_activations[self._index].array
        start = 0
        if dropout:
            start = int(dropout.context.counter_for(dropout.purpose, pre_activations.shape[1], block.place))
        cpu_kernels.affine_relu_dropout(
            pre_activations, self._scale, self._shift, start, self._threshold, block.activations[self._index].array
        )

    def relu_dropout_backward(self, block: Block) -> None:
        """Gradient through ReLU and dropout: reads `scratch`, writes `activations`.

        What came through ReLU and dropout is greater than 0, all else is 0, so it is the mask of both; it is needed no
        more and makes space for the gradient.
        """
        index = self._index
        cpu_kernels.relu_dropout_backward(
            block.scratch[index].array,
            block.pre_activations[index].array,
            block.activations[index].array,
            self._totals_of[block.slice],
        )

    def finish(self, found: Sequence[Gradients]) -> None:
        """After `relu_dropout_backward` of all blocks: gradients of vectors, coefficients for the next pass."""
        for of_slice, totals in zip(found, self._totals, strict=True):
            of_slice.add(self._layer.linear.bias, totals[0])
        self._totals.fill(0)

    def batch_norm_backward_elemt(self, block: Block) -> None:
        """From the gradient of what ReLU is given to that of the Linear's sums, in `activations`."""


class Normalised(Activation):
    """BatchNorm before ReLU, whose arithmetic on a few numbers for each feature is in float64.

    In float64, so that world sizes, whose blocks differ, round to the same scale and shift:
    see determinism/batch_norm.py.
    The Linear's bias it would take away again, so only its running mean is told of it.
    """

    def __init__(self, layer: Layer, index: int, blocks: Sequence[Block]) -> None:
        super().__init__(layer, index, blocks)
        self._norm = norm = cast(GatheredBatchNorm1d, layer.norm)
        num_slices, _, features = self._totals.shape
        # Count, mean and variance of each feature: of each block, of each slice, of all slices of all ranks.
        of_blocks = np.zeros((len(blocks), 3, features))
        of_blocks[:, 0] = np.array([[block.num_rows] for block in blocks])
        self._statistics_of = dict(zip(blocks, of_blocks, strict=True))
        self._of_slices = of_blocks if len(blocks) == num_slices else np.zeros((num_slices, 3, features))
        borders = np.cumsum(np.bincount([block.slice for block in blocks]))[:-1]
        self._blocks_of = np.split(of_blocks, borders)
        self._slices_tensor, self._totals_tensor = (torch.from_numpy(x) for x in (self._of_slices, self._totals))
        self._of_all = np.zeros((3, features))
        self._mean, self._inverse_std = self._of_all[1], np.zeros(features)
        self._shift, self._const_coef, self._z_coef = (np.zeros_like(self._scale) for _ in range(3))
        self._weight = np.ones_like(self._scale) if norm.weight is None else norm.weight.detach().numpy()
        self._bias = np.zeros_like(self._scale) if norm.bias is None else norm.bias.detach().numpy()

    def batch_norm_stats(self, block: Block) -> None:
        """Take a block's statistics, while it is in the cache."""
        cpu_kernels.batch_norm_stats(block.pre_activations[self._index].array, self._statistics_of[block])

    def prepare(self) -> None:
        """Find scale and shift, over all rows of all ranks."""
        norm = self._norm
        if len(self._statistics_of) > len(self._of_slices):  # a slice has several blocks
            for of_blocks, of_slice in zip(self._blocks_of, self._of_slices, strict=True):
                cpu_kernels.batch_norm_gather_stats(of_blocks, of_slice)
        parts = norm.collectives.all_gather(self._slices_tensor).flatten(0, 1).numpy()
        count = cpu_kernels.batch_norm_scale_shift(
            parts, self._of_all, norm.eps, self._weight, self._bias, self._inverse_std, self._scale, self._shift
        )
        self._count = norm.require_rows(count)
        share = norm.count_batch()
        if share is not None:
            mean, var = (cast(Tensor, buffer).numpy() for buffer in (norm.running_mean, norm.running_var))
            cpu_kernels.update_running_stats(mean, var, self._of_all, self._added, share)

    def finish(self, found: Sequence[Gradients]) -> None:
        """The factors of `batch_norm_backward_elemt` take the sums over all rows of all ranks."""
        norm, totals = self._norm, self._totals
        cpu_kernels.batch_norm_backward_reduce(totals, self._mean, self._inverse_std)
        for of_slice, own in zip(found, totals, strict=True):
            of_slice.add(norm.bias, own[0])
            of_slice.add(norm.weight, own[1])
        of_all = norm.collectives.ordered_sum(self._totals_tensor).numpy()
        cpu_kernels.batch_norm_backward_coefficients(
            of_all, self._count, self._mean, self._inverse_std, self._weight, self._z_coef, self._const_coef
        )
        totals.fill(0)

    def batch_norm_backward_elemt(self, block: Block) -> None:
        """The gradient of the sums, of which BatchNorm's mean and variance are made as well."""
        index = self._index
        cpu_kernels.batch_norm_backward_elemt(
            block.activations[index].array,
            block.pre_activations[index].array,
            self._scale,
            self._z_coef,
            self._const_coef,
        )
