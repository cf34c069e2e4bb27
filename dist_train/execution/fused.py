"""Steps of a small network on a GPU in some kernels of its own, several of them sent off at once."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.dropout import KeyedDropout
from dist_train.execution.base import MAX_STEPS
from dist_train.execution.optimizer import AdamW
from dist_train.execution.recorder import Recorder, Recording, record_or_warn
from dist_train.models.embeddings import TabularInputs
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.training.loss import CrossEntropy
from dist_train.training.protocols import Batch
from dist_train.training.step import EagerStep, Number

if TYPE_CHECKING:
    from dist_train.accel.gpu_network import GpuNetwork, Index, Rows

# Units of the second hidden layer, of which a tile stays in registers, and classes.
_MAX_UNITS, _MAX_CLASSES = 512, 64
# Steps of a shape before it is recorded: the first one compiles its kernels.
_WARM_UP_STEPS = 1
# Shapes that are kept: full batches, the last one of an epoch, and one of two rows more than that.
_MAX_SHAPES = 3
# Steps in the longer one of a shape's two graphs: one launch of the host for all of them.
_STEPS_OF_A_GRAPH = 8
# Rows of the steps that are put off, from which on a GPU that has nothing to do is sent them: to send steps takes the
# host as long as to prepare some of them, which smaller batches do not get back.
_ROWS_FOR_AN_IDLE_GPU = 1 << 16

Shape = tuple[tuple[int, ...], int]
"""Rows of this rank's slices, and rows of all ranks."""


class _PutOff(NamedTuple):
    batch: Batch
    lr: float
    vote: float

    @property
    def shape(self) -> Shape:
        return self.batch.context.slices, self.batch.global_rows


class FusedSteps:
    """What `EagerStep.compute` does, in the kernels of `accel/gpu_network`; all but dropout's masks agree to rounding.

    A step is the same bits on any number of ranks that hold the same slices. While `hold` is on a step is put off until
    `settle`, which sends all of them off with one copy, or until the GPU has nothing to do; their results are in
    tensors of the host once they are no longer under way, until `settle` was called twice more. Steps aside for
    micro-batches and other rows than the kernels know.
    """

    averages = True

    def __init__(
        self, eager: EagerStep, model: FinancialClassifier, context: ModelContext, recorder: Recorder | None
    ) -> None:
        self._eager, self._model, self._context, self._recorder = eager, model, context, recorder
        self._network = _network_of(eager, model)
        self._drops = [layer for layer in model.layers if isinstance(layer, KeyedDropout)]
        self._widths = self._network.hidden, self._network.units
        self._reads_rows = _passes_numbers(model.inputs)
        self._table: Rows | None = None
        """All rows, where the kernels can read them as they are."""
        self._shapes: dict[Shape, _StepsOfShape] = {}
        self._held = False
        self._put_off: list[_PutOff] = []
        self._sent = 0
        """Steps of the first block that have been sent off before `settle` asked for it."""
        self._blocks = deque(self._memory_for_results() for _ in range(3))
        """Of the steps that are put off, of those under way, and of those before."""
        self._arrived: torch.cuda.Event | None = None
        """When the steps that were settled last are computed."""
        self._busy: torch.cuda.Event | None = None
        """When the steps that were sent off last are computed."""

    def _memory_for_results(self) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Of MAX_STEPS steps: all of it, and of each step its totals, norm, and whether they were finite."""
        results = torch.zeros((MAX_STEPS, 5), dtype=torch.float64, pin_memory=self._on_gpu)
        totals, norms, finite = results[:, :3], results[:, 3], results[:, 4]
        # All at once: to make a view takes longer than to take one out of a list.
        return results, list(zip(totals.unbind(), norms.unbind(), finite.unbind(), strict=True))

    @property
    def _on_gpu(self) -> bool:
        return self._eager.collectives.device.type == "cuda"

    def hold(self, *, on: bool) -> None:
        """Put steps off from now on, or do so no more; those that were and not computed are dropped."""
        self._held, self._put_off, self._sent = on, [], 0

    def settle(self, *, wait: bool) -> int | None:
        """Send off what was put off; how many of these steps are under way, None where there was nothing."""
        count = self._sent + len(self._put_off)
        if count:
            former = self._arrived
            self._send_all()
            self._arrived, self._sent = self._busy, 0
            self._blocks.rotate()
            if not wait:
                self._wait_for(former)
                return count
        elif not wait or self._arrived is None:
            return None
        self._wait_for(self._arrived)
        self._arrived = None
        return 0

    def _wait_for(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            # Where a rank hangs in a kernel that waits for the others, it is here that it is seen to hang.
            with self._eager.collectives.heartbeat.waiting("fetch"):
                event.synchronize()

    def compute(
        self, batches: Sequence[Batch], lr: float | Tensor, vote: float | Tensor
    ) -> tuple[Tensor, Number, Tensor | bool]:
        """Totals, gradient norm, and whether both were finite, as of `EagerStep.compute`."""
        if len(batches) != 1 or len(batches[0].context.slices) != self._slices:
            self.settle(wait=True)
            return self._eager.compute(batches, lr, vote)
        self._put_off.append(_PutOff(batches[0], float(lr), float(vote)))
        if self._held:
            place = self._sent + len(self._put_off) - 1
            if place >= MAX_STEPS:
                raise AssertionError("a caller that holds steps settles them")
            if len(self._put_off) * batches[0].global_rows >= _ROWS_FOR_AN_IDLE_GPU and self._idle():
                self._send_all()
            totals, norm, finite = self._blocks[0][1][place]
            return totals, norm, finite
        sent, self._put_off = self._put_off, []
        result = self._steps_of(sent[0]).send(sent)[0].clone()
        return result[:3], result[3], result[4] == 1

    @property
    def settled(self) -> bool:
        """Whether steps are recorded by now, or none will be."""
        return any(steps.settled for steps in self._shapes.values())

    @property
    def _slices(self) -> int:
        return len(self._context.gradients or [()])

    def _idle(self) -> bool:
        """Whether a GPU has computed all that it was sent; a CPU has whenever it is asked."""
        return self._on_gpu and (self._busy is None or bool(self._busy.query()))

    def _send_all(self) -> None:
        """Send off what is put off."""
        if not self._put_off:
            return
        sent, self._put_off = self._put_off, []
        self._send(sent, self._blocks[0][0][self._sent :])
        self._sent += len(sent)
        if self._on_gpu:
            self._busy = torch.cuda.Event()
            self._busy.record()

    def _send(self, sent: list[_PutOff], results: Tensor) -> None:
        """In their order, all those of a shape that follow each other at once."""
        done = 0
        for _, group in groupby(sent, lambda one: one.shape):
            steps = list(group)
            found = self._steps_of(steps[0]).send(steps)
            results[done : done + len(steps)].copy_(found, non_blocking=True)
            done += len(steps)

    def _steps_of(self, one: _PutOff) -> _StepsOfShape:
        """What takes steps of a shape; one that is seldom seen is not kept."""
        kept = self._shapes.get(one.shape)
        if kept is None:
            kept = _StepsOfShape(self, one.batch, self._recorder)
            if len(self._shapes) < _MAX_SHAPES:
                self._shapes[one.shape] = kept
        return kept

    def numbers_of(self, one: _PutOff) -> list[int]:
        """The head of a step's message: first counters of both dropouts, learning rate and vote as float64's bits."""
        counters = [
            self._context.counter_of(one.batch.context, drop.purpose, width)
            for drop, width in zip(self._drops, self._widths, strict=True)
        ]
        return [*counters, *struct.unpack("<2q", struct.pack("<2d", one.lr, one.vote))]

    @torch.no_grad()
    def rows_of(self, batch: Batch) -> Rows:
        """What the kernels read of a batch, in its order."""
        from dist_train.accel.gpu_network import Rows

        features: Tensor = self._model.inputs(*batch.inputs)
        return Rows(features.contiguous(), batch.targets, batch.weights)

    def table_of(self, batch: Batch) -> Rows | None:
        """All rows, where the kernels can read them as they are, by the index of a batch."""
        from dist_train.accel.gpu_network import Rows

        if self._table is None and self._reads_rows and batch.table is not None:
            self._table = Rows(_aligned(batch.table.inputs[0]), batch.table.targets, batch.table.weights)
        return self._table

    def follow(self) -> None:
        """Let the moving average follow the step whose kernels were launched last."""
        if self._eager.average is not None:
            self._eager.average.update(self._network.verdict)

    @property
    def network(self) -> GpuNetwork:
        """What computes a step."""
        return self._network

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self._eager.collectives.size

    def close(self) -> None:
        """Free the graphs."""
        for steps in self._shapes.values():
            steps.close()
        self._shapes.clear()
        self._recorder = None


class _StepsOfShape:
    """Memory for steps of one shape, and their kernels, recorded once they have run."""

    def __init__(self, fused: FusedSteps, batch: Batch, recorder: Recorder | None) -> None:
        from dist_train.accel.gpu_network import Inbox, slices_on

        self._fused, self._batch = fused, batch
        self._recorder = recorder
        device = fused.network.now.device
        rows = len(batch.index)
        slices = slices_on(device, batch.context.slices, fused.ranks)
        self.buffers = fused.network.buffers(slices, rows, batch.global_rows)
        self.inbox = Inbox(MAX_STEPS, rows, device)
        self._places = torch.arange(rows, device=device)
        self._taken = 0
        self._graphs: dict[int, Recording] = {}
        self.settled = recorder is None
        """Whether the next step is recorded, or will not be."""
        self._arrived: Rows | None = None
        """Rows that the host has sent, always in the same memory, where they are not on the device."""

    def send(self, steps: list[_PutOff]) -> Tensor:
        """Take steps; their results, (steps, 5) float64 on the device, which the next call overwrites."""
        inbox, count = self.inbox, len(steps)
        message = torch.empty((count, inbox.numbers.shape[1]), dtype=torch.int64, pin_memory=inbox.numbers.is_cuda)
        message[:, : inbox.header] = torch.tensor([self._fused.numbers_of(one) for one in steps])
        torch.stack([one.batch.index for one in steps], out=message[:, inbox.header :])
        inbox.receive(message)
        self._fused.network.read_weights()
        done = 0
        while done < count:
            if steps[0].batch.table is None:
                self._receive(self._fused.rows_of(steps[done].batch))
                together = 1
            else:
                settled = self._taken >= _WARM_UP_STEPS
                together = _STEPS_OF_A_GRAPH if settled and count - done >= _STEPS_OF_A_GRAPH else 1
            self._take(together)
            done += together
        return inbox.results[:count]

    def _receive(self, rows: Rows) -> None:
        if self._arrived is None:
            features, targets, weights = rows
            self._arrived = rows._replace(
                features=features.clone(), targets=targets.clone(), weights=None if weights is None else weights.clone()
            )
            return
        for kept, sent in zip(self._arrived, rows, strict=True):
            if kept is not None and sent is not None:
                kept.copy_(sent)

    def _take(self, count: int) -> None:
        graph = self._graph(count) if self._taken >= _WARM_UP_STEPS else None
        if graph is None:
            self._launch(count)
        else:
            graph.replay()
        self._taken += count

    def _graph(self, count: int) -> Recording | None:
        if self._recorder is not None and count not in self._graphs:
            graph = record_or_warn(self._recorder, lambda: self._launch(count))
            self.settled = True
            if graph is None:
                self._recorder = None
            else:
                self._graphs[count] = graph
        return self._graphs.get(count)

    def _launch(self, count: int) -> None:
        for _ in range(count):
            rows, index = self._next_rows()
            self.buffers.launch(rows, index, self.inbox)
            self._fused.follow()

    def _next_rows(self) -> tuple[Rows, Index]:
        """What the next step reads, and where."""
        if self._arrived is not None:
            return self._arrived, (self._places, 0)
        table, inbox = self._fused.table_of(self._batch), self.inbox
        if table is not None:
            return table, inbox.index
        index = inbox.numbers.index_select(0, inbox.cursor.view(1))[0, inbox.header :]
        return self._fused.rows_of(self._batch.by_index(index, self._batch.context)), (self._places, 0)

    def close(self) -> None:
        """Free the graphs."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()


def fuse_steps(
    eager: EagerStep, model: nn.Module, context: ModelContext, recorder: Recorder | None
) -> FusedSteps | None:
    """The computation of a step in kernels of its own, where they know the model, the loss and the optimizer.

    Without `recorder` nothing is recorded.
    """
    if type(model) is not FinancialClassifier or not _known(eager, model) or find_spec("triton") is None:
        return None
    return FusedSteps(eager, model, context, recorder)


def _known(eager: EagerStep, model: FinancialClassifier) -> bool:
    optimizer, objective = eager.optimizer, eager.objective
    if type(objective) is not CrossEntropy or not isinstance(optimizer, AdamW):
        return False
    first, norm, *_, last = cast(Any, list(model.layers))
    plain = norm.momentum is not None and norm.affine and norm.track_running_stats
    sizes = last.in_features <= _MAX_UNITS and last.out_features <= _MAX_CLASSES
    single = first.weight.dtype == torch.float32 and eager.autocast_dtype in (None, torch.bfloat16)
    groups = [(multiplier, decay) for _, _, multiplier, decay in optimizer.groups]
    decays = [decay for _, decay in groups]
    together = all(multiplier == 1 for multiplier, _ in groups) and not any(decays[1:])
    return bool(plain and sizes and single and together) and next(model.inputs.parameters(), None) is None


def _passes_numbers(inputs: nn.Module) -> bool:
    """Whether a model's features are its first argument as it is."""
    plain = getattr(inputs, "_plain", [inputs])[0]  # in the exact mode
    return isinstance(plain, nn.Identity) or (isinstance(plain, TabularInputs) and plain.width == plain.num_numeric)


def _aligned(features: Tensor) -> Tensor:
    """Features whose rows begin at multiples of 16 bytes, which a thread reads at once; zeros fill them up."""
    missing = -features.shape[1] % 4
    return F.pad(features, (0, missing)) if missing else features


def _network_of(eager: EagerStep, model: FinancialClassifier) -> GpuNetwork:
    from dist_train.accel.gpu_network import GpuNetwork, Loss, Optimum

    optimizer: Any = eager.optimizer
    objective: Any = eager.objective
    parameters = optimizer.parameters
    trained = set(parameters.parameters)
    _, first_end, _, first_decay = optimizer.groups[0]
    optimum = Optimum(
        parameters.values, optimizer.moments, optimizer.steps, first_end if first_decay else 0, first_decay,
        optimizer.betas, optimizer.eps, eager.max_grad_norm,
        lambda parameter: parameters.offset_of(parameter) if parameter in trained else None,
    )  # fmt: skip
    weights = objective.class_weights
    loss = Loss(None if weights is None else weights.float(), objective.label_smoothing)
    collectives = eager.collectives

    def gather(tensor: Tensor) -> Tensor:
        return collectives.all_gather(tensor).flatten(0, 1)

    precision = "tf32x3" if eager.autocast_dtype is None else "bf16"
    return GpuNetwork(model.layers, optimum, loss, gather, precision)
