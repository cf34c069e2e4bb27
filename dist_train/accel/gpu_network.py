"""A training step of FinancialClassifier in eight kernels, the same ones in the fast and in the exact mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import triton
from torch import Tensor, nn

from dist_train.accel import gpu_layers, gpu_sums
from dist_train.determinism.dropout import KeyedDropout
from dist_train.determinism.keyed_random import INCREMENT

_SIGNED_INCREMENT = INCREMENT - (1 << 64)
# Of a program: columns where all pieces are added up, parameters of the sum of pieces, parameters of the update.
_FEW_COLUMNS, _FEWER, _BLOCK = 16, 128, 1024
# Classes up to which the last layer's products are sums of single ones.
_FEW_CLASSES = 4


class Block(NamedTuple):
    """What a program takes at a time, `rows` of the batch and `columns` of the first hidden layer, on `warps`."""

    rows: int
    columns: int
    warps: int


class Tuning(NamedTuple):
    """What was found to be fast for batches of about a size: the rows of a step in at most `pieces`, and blocks.

    `inputs` and `weights` are the two halves of the second layer's backward pass: back to its inputs, and to its
    weights. `weights` None: both in one kernel, which needs more registers and one launch less.
    """

    pieces: int
    first: Block
    second: Block
    inputs: Block
    weights: Block | None
    last: Block


TUNINGS = {
    2048: Tuning(256, Block(16, 64, 4), Block(16, 64, 8), Block(16, 32, 4), None, Block(16, 32, 4)),
    16384: Tuning(256, Block(64, 32, 4), Block(64, 32, 8), Block(32, 64, 4), Block(64, 64, 8), Block(64, 128, 8)),
    1 << 62: Tuning(132, Block(64, 64, 4), Block(128, 32, 8), Block(64, 64, 4), Block(32, 64, 4), Block(64, 64, 4)),
}
"""By the rows of all ranks up to which they are taken."""
_UNITS_OF_TUNINGS, _CLASSES_OF_TUNINGS = 128, 16
"""Units of the second hidden layer and classes, up to which they are taken as they are."""


@dataclass(frozen=True)
class Tiling:
    """How the rows of a step are cut: a function of the rows of all ranks and the number of slices of all ranks."""

    tuning: Tuning
    piece_rows: int
    pieces_of_slice: int

    @classmethod
    def of(cls, rows: int, num_slices: int, tuning: Tuning | None = None) -> Tiling:
        """Slices in pieces of whole tiles."""
        chosen = tuning or next(one for most, one in TUNINGS.items() if rows <= most)
        longest = max(1, -(-rows // num_slices))
        tile = max(block.rows for block in chosen if isinstance(block, Block))
        piece_rows = tile * -(-longest // (tile * max(1, chosen.pieces // num_slices)))
        return cls(chosen, piece_rows, -(-longest // piece_rows))


@dataclass(frozen=True)
class Optimum:
    """AdamW's part: flat `values`, `moments` (2, size), `steps` (), the first `decayed` values, and its numbers."""

    values: Tensor
    moments: Tensor
    steps: Tensor
    decayed: int
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_norm: float | None
    offset_of: Callable[[Tensor], int | None]
    """Where a parameter begins in `values`; None: it is not trained."""


@dataclass(frozen=True)
class Loss:
    """Cross-entropy's part: class weights, (classes,), or none, and label smoothing."""

    class_weights: Tensor | None
    smoothing: float


class Rows(NamedTuple):
    """Rows to train on: features (n, inputs) float32, targets (n,) integers, weights (n,) float64 or none."""

    features: Tensor
    targets: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Slices:
    """Where the slices of this rank begin in its batch, (slices + 1,) int64 on the device, and those of all ranks."""

    starts: Tensor
    own: int
    all: int


Index = tuple[Tensor, int]
"""Places of the rows of a step, (n,) int64, and how far those of the next step are from them; 0: the same memory."""


class Inbox:
    """What the host sends for `places` steps: NOW_SIZE - 2 numbers and, with `index_length`, as many row indices each.

    The kernels take the steps one after the other; `cursor` is the next one's place. `results` are (places, 5).
    """

    def __init__(self, places: int, index_length: int, device: torch.device) -> None:
        self.header = gpu_sums.NOW_SIZE - 2
        self.numbers = torch.zeros((places, self.header + index_length), dtype=torch.int64, device=device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)
        self.results = torch.zeros((places, gpu_sums.RESULT_SIZE), dtype=torch.float64, device=device)
        self._transfers = torch.cuda.Stream(device) if device.type == "cuda" else None

    def receive(self, message: Tensor) -> None:
        """Take the host's numbers of the first steps, (steps, ...) in pinned memory where a GPU has the inbox.

        They travel to the GPU beside the kernels that are under way, and are put in their place behind these.
        """
        if self._transfers is not None:
            work = torch.cuda.current_stream()
            with torch.cuda.stream(self._transfers):
                message = message.to(self.numbers.device, non_blocking=True)
            work.wait_stream(self._transfers)
            message.record_stream(work)
        self.numbers[: len(message)].copy_(message)
        self.cursor.zero_()

    @property
    def index(self) -> Index:
        """Where the rows of the next step are."""
        return self.numbers[0, self.header :], self.numbers.stride(0)


class GpuNetwork:
    """The kernels of a step over one model's parameters, on slices of one shape."""

    def __init__(
        self,
        layers: nn.Sequential,
        optimum: Optimum,
        loss: Loss,
        gather: Callable[[Tensor], Tensor],
        precision: str,
    ) -> None:
        """`gather`: (...) of this rank -> (ranks, ...), in rank order; `precision`: of products, as tl.dot has it."""
        first, norm, _, drop1, second, _, drop2, last = list(layers)
        self.first, self.second, self.last = cast("tuple[nn.Linear, ...]", (first, second, last))
        self.norm = cast(nn.BatchNorm1d, norm)
        self.drops = _dropout(drop1), _dropout(drop2)
        self.optimum, self.loss, self.gather, self.precision = optimum, loss, gather, precision
        self.inputs, self.hidden = self.first.in_features, self.first.out_features
        self.units, self.classes = self.last.in_features, self.last.out_features
        device = optimum.values.device
        self.in_parts = precision == "tf32x3"
        self.parts = torch.zeros((4 if self.in_parts else 2, self.units * self.hidden), device=device)
        """The second layer's weights and their transpose, for "tf32x3" in two parts each."""
        self.verdict = torch.ones((), dtype=torch.bool, device=device)
        self.now = torch.zeros(gpu_sums.NOW_SIZE, dtype=torch.int64, device=device)
        beta1, beta2 = optimum.betas
        self.settings = torch.tensor(
            [
                math.inf if optimum.max_norm is None else optimum.max_norm,
                beta1, beta2, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), optimum.eps, optimum.weight_decay,
            ],
            dtype=torch.float64, device=device,
        )  # fmt: skip
        self.ones = torch.ones(1, device=device)
        self.zeros = torch.zeros(max(self.hidden, self.units, self.classes), device=device)

    def read_weights(self) -> None:
        """Take the second layer's weights as they are now; steps keep what they were made into up to date."""
        gpu_sums.split_weights[(triton.cdiv(self.units * self.hidden, _BLOCK),)](
            self.second.weight, self.parts, U=self.units, H=self.hidden, IN_PARTS=self.in_parts, BLOCK=_BLOCK
        )

    def buffers(self, slices: Slices, rows_here: int, rows: int) -> Buffers:
        """Memory for steps of one shape: `rows_here` of `rows` on all ranks."""
        return Buffers(self, slices, rows_here, Tiling.of(rows, slices.all))


def _dropout(module: nn.Module) -> tuple[int, float, bool]:
    """Threshold, scale, and whether anything is dropped at all."""
    if isinstance(module, KeyedDropout):
        return module.threshold, module.scale, module.scale != 1
    return 0, 1.0, False


def _log(number: float) -> float:
    return math.log(number) if number else -math.inf


class Buffers:
    """What lies between the kernels of a step of one shape."""

    def __init__(self, network: GpuNetwork, slices: Slices, rows: int, tiling: Tiling) -> None:
        self.network, self.slices, self.tiling = network, slices, tiling
        self.pieces, self.all_pieces = slices.own * tiling.pieces_of_slice, slices.all * tiling.pieces_of_slice
        self.cut = {"PIECE_ROWS": tiling.piece_rows, "PIECES": tiling.pieces_of_slice}
        device, size = network.optimum.values.device, len(network.optimum.values)

        def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        hidden, units = network.hidden, network.units
        self.size = size
        self.y1, self.dz, self.dy2 = floats(rows, hidden), floats(rows, hidden), floats(rows, units)
        self.stats = floats(self.pieces, 2 * hidden + 1, dtype=torch.float64)
        self.sums = floats(self.pieces, 2, hidden, dtype=torch.float64)
        self.mean, self.inverse_std, self.means = floats(hidden), floats(hidden), floats(2, hidden)
        self.partials, self.losses = floats(self.pieces, size), floats(self.pieces, 2, dtype=torch.float64)
        self.of_slices, self.totals = floats(slices.own, size), floats(slices.own, 3, dtype=torch.float64)
        self.parts = triton.cdiv(size, _BLOCK)
        self.gradient, self.squares = floats(size), floats(self.parts, dtype=torch.float64)

    def launch(self, rows: Rows, index: Index, inbox: Inbox) -> None:
        """The kernels of the next step of `inbox`, on the rows at `index`."""
        self.first_linear(rows, index, inbox)
        stats = self.network.gather(self.stats)
        self.merge_statistics(stats, inbox)
        self.second_linear(rows, index)
        self.second_linear_backward()
        if self._offset(self.network.first.weight) >= 0:
            self.first_linear_backward(rows, index, self.network.gather(self.sums), stats)
        self.add_up()
        self.update(self.network.gather(self.of_slices), self.network.gather(self.totals), rows, inbox)

    def first_linear(self, rows: Rows, index: Index, inbox: Inbox) -> None:
        """y1 and the statistics of its pieces."""
        network, block = self.network, self._block(self.tiling.tuning.first)
        gpu_layers.first_linear[(self.pieces, triton.cdiv(network.hidden, block.columns))](
            rows.features, *index, inbox.numbers, inbox.numbers.stride(0), inbox.cursor, network.optimum.steps,
            network.now, network.first.weight, self.y1, self.stats, self.slices.starts, **self.cut,
            NOW=gpu_sums.NOW_SIZE, F=network.inputs, X_STRIDE=rows.features.stride(0), H=network.hidden,
            BM=block.rows, BF=min(64, _power(network.inputs)), BH=block.columns, PRECISION=network.precision,
            num_warps=block.warps,
        )  # fmt: skip

    def merge_statistics(self, stats: Tensor, inbox: Inbox) -> None:
        """Mean and deviation of the batch."""
        network, norm = self.network, self.network.norm
        bias = network.zeros if network.first.bias is None else network.first.bias
        gpu_sums.merge_statistics[(triton.cdiv(network.hidden, _FEW_COLUMNS),)](
            stats, bias, self.mean, self.inverse_std, norm.running_mean, norm.running_var, norm.num_batches_tracked,
            inbox.cursor, norm.eps, norm.momentum, NUM_PIECES=self.all_pieces, H=network.hidden, BP=min(64,
            _power(self.all_pieces)), BH=_FEW_COLUMNS,
        )  # fmt: skip

    def second_linear(self, rows: Rows, index: Index) -> None:
        """From y1 to the loss, and back to dy2."""
        network, block, at = self.network, self._block(self.tiling.tuning.second), self._offset
        block = self._of_all_units(block)
        second, last, loss = network.second, network.last, network.loss
        (threshold1, scale1, drops1), (threshold2, scale2, drops2) = network.drops
        gpu_layers.second_linear_and_loss[(self.pieces,)](
            *self._normal, network.parts, self._bias(second), last.weight, self._bias(last), *index, rows.targets,
            network.ones if loss.class_weights is None else loss.class_weights,
            network.ones if rows.weights is None else rows.weights, network.now, self.dy2, self.partials, self.losses,
            self.size, at(second.bias), at(last.weight), at(last.bias), self.slices.starts, threshold1, scale1,
            threshold2, scale2, loss.smoothing, **self.cut, DROPS1=drops1, DROPS2=drops2,
            OF_CLASSES=loss.class_weights is not None, OF_ROWS=rows.weights is not None,
            FEW_CLASSES=network.classes <= _FEW_CLASSES, TRAINS_B2=at(second.bias) >= 0, TRAINS_W3=at(last.weight) >= 0,
            TRAINS_B3=at(last.bias) >= 0, NOW=gpu_sums.NOW_SIZE, INCREMENT=_SIGNED_INCREMENT, H=network.hidden,
            U=network.units, C=network.classes, BM=block.rows, BK=block.columns, BO=_power(network.units),
            BC=_power(network.classes), PRECISION=network.precision, num_warps=block.warps,
        )  # fmt: skip

    def second_linear_backward(self) -> None:
        """From dy2 to dz, and the gradients of the second layer and of BatchNorm's weights."""
        tuning = self.tiling.tuning
        self._backward(tuning.inputs, of_inputs=True, of_weights=tuning.weights is None)
        if tuning.weights is not None:
            self._backward(tuning.weights, of_inputs=False, of_weights=True)

    def _backward(self, wanted: Block, *, of_inputs: bool, of_weights: bool) -> None:
        network, block, at = self.network, self._block(wanted), self._offset
        of_weights = of_weights and at(network.second.weight) >= 0
        if not (of_inputs or of_weights):
            return
        threshold, scale, drops = network.drops[0]
        gpu_layers.second_linear_backward[(self.pieces, triton.cdiv(network.hidden, block.columns))](
            *self._normal, network.parts, self.dy2, network.now, self.dz, self.sums, self.partials, self.size,
            at(network.second.weight), at(network.norm.weight), at(network.norm.bias), self.slices.starts, threshold,
            scale, **self.cut, OF_INPUTS=of_inputs, DROPS1=drops, TRAINS_W2=of_weights,
            TRAINS_GAMMA=at(network.norm.weight) >= 0, TRAINS_BETA=at(network.norm.bias) >= 0,
            INCREMENT=_SIGNED_INCREMENT, H=network.hidden, U=network.units, BM=block.rows, BH=block.columns,
            BO=_power(network.units), BK=min(32, _power(network.units)), PRECISION=network.precision,
            num_warps=block.warps,
        )  # fmt: skip

    def first_linear_backward(self, rows: Rows, index: Index, sums: Tensor, stats: Tensor) -> None:
        """Through BatchNorm to the gradient of the first layer."""
        network, block = self.network, self._block(self.tiling.tuning.last)
        features = min(64, _power(network.inputs))
        gpu_sums.merge_sums[(triton.cdiv(network.hidden, _FEW_COLUMNS),)](
            sums, stats, self.means, NUM_PIECES=self.all_pieces, H=network.hidden, BP=min(64,
            _power(self.all_pieces)), BH=_FEW_COLUMNS,
        )  # fmt: skip
        grid = self.pieces, triton.cdiv(network.hidden, block.columns), triton.cdiv(network.inputs, features)
        gpu_layers.first_linear_backward[grid](
            rows.features, *index, network.now, self.y1, self.mean, self.inverse_std, network.norm.weight, self.dz,
            self.means, self.partials, self.size, self._offset(network.first.weight), self.slices.starts, **self.cut,
            NOW=gpu_sums.NOW_SIZE, F=network.inputs, X_STRIDE=rows.features.stride(0), H=network.hidden,
            BM=block.rows, BF=features, BH=block.columns, PRECISION=network.precision, num_warps=block.warps,
        )  # fmt: skip

    def add_up(self) -> None:
        """The gradient, loss and weight of each slice."""
        gpu_sums.sum_of_pieces[(triton.cdiv(self.size, _FEWER), self.slices.own)](
            self.partials, self.losses, self.network.now, self.size, self.of_slices, self.totals,
            PIECES=self.tiling.pieces_of_slice, BP=min(16, _power(self.tiling.pieces_of_slice, 1)), BLOCK=_FEWER,
        )  # fmt: skip

    def update(self, gradients: Tensor, totals: Tensor, rows: Rows, inbox: Inbox) -> None:
        """AdamW by the gradients of the slices of all ranks."""
        network, optimum = self.network, self.network.optimum
        gpu_sums.sum_of_slices[(self.parts,)](
            gradients, self.size, self.gradient, self.squares, SLICES=self.slices.all, BLOCK=_BLOCK
        )
        gpu_sums.clip_and_update[(self.parts,)](
            self.gradient, self.squares, totals, network.now, optimum.values, optimum.moments, optimum.steps,
            inbox.results, network.verdict, network.parts,
            self._offset(network.second.weight), self.size, optimum.decayed, network.settings, SLICES=self.slices.all,
            NOW=gpu_sums.NOW_SIZE, RESULT=gpu_sums.RESULT_SIZE, NUM_PARTS=self.parts, BPARTS=_power(self.parts, 1),
            BLOCK=_BLOCK, OF_ROWS=rows.weights is not None, U=network.units,
            H=network.hidden, IN_PARTS=network.in_parts,
        )  # fmt: skip

    @property
    def _normal(self) -> tuple[Tensor, ...]:
        """What activations are made of."""
        norm = self.network.norm
        return self.y1, self.mean, self.inverse_std, norm.weight, norm.bias

    def _block(self, block: Block) -> Block:
        """No more columns than there are."""
        return block._replace(columns=min(block.columns, _power(self.network.hidden)))

    def _of_all_units(self, block: Block) -> Block:
        """Fewer rows and columns where there are many units and classes, which shared memory has to hold with them."""
        network = self.network
        narrower = max(1, _power(network.units) // _UNITS_OF_TUNINGS) * (_power(network.classes) // _CLASSES_OF_TUNINGS)
        if narrower > 1 and network.classes > _FEW_CLASSES:
            narrower *= 2  # the last layer's products are those of tensor cores, whose factors are there as well
        return Block(max(16, block.rows // narrower), max(16, block.columns // narrower), block.warps)

    def _offset(self, parameter: Tensor | None) -> int:
        """Where a parameter's gradient begins; -1: it has none."""
        offset = None if parameter is None else self.network.optimum.offset_of(parameter)
        return -1 if offset is None else offset

    def _bias(self, linear: nn.Linear) -> Tensor:
        return self.network.zeros if linear.bias is None else linear.bias


def _power(number: int, at_least: int = 16) -> int:
    """The next power of two."""
    return max(at_least, 1 << max(0, number - 1).bit_length())


def slices_on(device: torch.device, lengths: Sequence[int], ranks: int) -> Slices:
    """The slices of a rank, of as many ranks with as many slices each."""
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device)
    return Slices(starts, len(lengths), len(lengths) * ranks)
