"""Where a micro-batch stands, handed to a model with its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from torch import Tensor, nn

from dist_train.determinism.arithmetic import Arithmetic
from dist_train.determinism.keyed_random import RowRandom

SliceGradients = list[dict[nn.Parameter, Tensor]]
"""For each slice of this rank, the gradient of each parameter."""


class Stream(NamedTuple):
    """A sequence of random bits: what they are for, and how many 16-bit numbers a row takes."""

    purpose: str
    width: int


@dataclass(frozen=True, slots=True)
class BatchContext:
    """The place of a micro-batch's rows in the training order. Of a part of its rows, `offset` is where it begins.

    `epoch` counts from 0; `first_row` is the place of the first row of the micro-batch in the epoch's order; `slices`
    are the lengths of the contiguous slices that its rows consist of. `counters` are the first counters of random
    streams, each () int64 on the device, for kernels that are recorded once and launched for other rows later.
    `global_rows` are the rows of the micro-batch on all ranks; None: not known.
    """

    epoch: int = 0
    first_row: int = 0
    slices: tuple[int, ...] = ()
    offset: int = 0
    counters: Mapping[Stream, Tensor] | None = None
    global_rows: int | None = None

    def part(self, start: int, length: int) -> BatchContext:
        """The context of `length` rows from row `start` on, as one slice."""
        return BatchContext(self.epoch, self.first_row, (length,), self.offset + start, self.counters, self.global_rows)


class ModelContext:
    """What the modules of one model share: random bits of a seed, the batch at hand, arithmetic, where gradients go.

    The batch is bound for the time of one forward pass, by `bound`; a module reads it as `batch`.

    Where `gradients` is set, modules that compute slice by slice add to it in their backward pass instead of handing
    sums to autograd. `visit_all_parameters`: autograd must come to each parameter all the same, since
    DistributedDataParallel waits for its hooks. `arithmetic` is that of passes that are written out, and of modules
    that compute slice by slice. While `elsewhere` is set, a pass works in other memory than otherwise; weights
    and `gradients` are in other memory as well, the same for each such pass.
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = RowRandom(seed)
        self.arithmetic = Arithmetic()
        self.gradients: SliceGradients | None = None
        self.visit_all_parameters = False
        self.elsewhere = False
        self._batch: BatchContext | None = None
        self._used: dict[Stream, None] = {}

    @property
    def batch(self) -> BatchContext:
        """The batch that the model is called on.

        Raises:
            RuntimeError: the model was called without one.
        """
        if self._batch is None:
            raise RuntimeError("a module that needs to know its batch was called in training without `bound`")
        return self._batch

    def bound(self, batch: BatchContext) -> _Bound:
        """A context manager: inside the block `batch` is the batch at hand, afterwards the one before it."""
        return _Bound(self, batch)

    def counter_for(self, purpose: str, width: int, place: int = 0) -> int | Tensor:
        """First SplitMix64 counter of a stream's bits for the rows from `place` on, counted in the batch at hand."""
        batch, stream = self.batch, Stream(purpose, width)
        self._used[stream] = None
        if batch.counters is not None:
            return batch.counters[stream] + self.random.distance(width, batch.offset + place)
        return self.counter_of(batch, purpose, width, place)

    def counter_of(self, batch: BatchContext, purpose: str, width: int, place: int = 0) -> int:
        """The same of a batch that need not be at hand, from its place in the training order."""
        return self.random.counter(purpose, width, batch.epoch, batch.first_row + batch.offset + place)

    def bits16(self, purpose: str, num_rows: int, width: int, like: Tensor) -> Tensor:
        """Uniform int16 numbers for the batch at hand, (num_rows, width), on the device of `like`."""
        return self.random.bits16(self.counter_for(purpose, width), num_rows, width, like.device)

    def bits16_of_tokens(self, purpose: str, like: Tensor, max_tokens: int) -> Tensor:
        """Uniform int16 numbers in the shape of `like`, (rows, tokens, width): a function of row, token and number.

        `max_tokens`: tokens of a row at most.
        """
        num_rows, num_tokens, width = like.shape
        batch = self.batch
        first = (batch.first_row + batch.offset) * max_tokens
        counter = self.random.counter(purpose, width, batch.epoch, first)
        return self.random.bits16_of_tokens(counter, num_rows, num_tokens, width, max_tokens, like.device)

    @property
    def used_streams(self) -> list[Stream]:
        """Every stream that bits were drawn from so far."""
        return list(self._used)


class _Bound:
    """A context manager without the cost of a generator: it surrounds every forward pass."""

    __slots__ = ("_batch", "_context", "_former")

    def __init__(self, context: ModelContext, batch: BatchContext) -> None:
        self._context = context
        self._batch = batch
        self._former: BatchContext | None = None

    def __enter__(self) -> None:
        self._former, self._context._batch = self._context._batch, self._batch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context._batch = self._former
