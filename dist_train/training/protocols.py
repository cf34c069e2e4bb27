"""The protocols of what training gets as arguments and does not import; a test gives it fakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dist_train.determinism.arithmetic import Arithmetic
from dist_train.determinism.batch_context import BatchContext
from dist_train.determinism.position import Position


class Batch(Protocol):
    """This rank's rows of one forward-backward pass. Only the model and the loss look inside `inputs` and `targets`.

    They are read by `index`, the places of the rows in memory; `by_index` gives a twin that reads by another tensor.
    `table`: what `index` are places in, where all of it is on the device: inputs, targets and weights of all rows.
    `weights`, (rows,): how much each row counts; None: all count 1.
    """

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor | None: ...
    @property
    def table(self) -> Any | None: ...
    @property
    def index(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def context(self) -> BatchContext: ...
    @property
    def global_rows(self) -> int: ...
    def by_index(self, index: Tensor, context: BatchContext) -> Batch: ...


class Feed(Protocol):
    """Yields what one optimizer step trains on, and the position after it, without end."""

    @property
    def num_rows(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    def steps(self, position: Position) -> Iterator[tuple[list[Any], Position]]: ...


class GradientReducer(Protocol):
    """Gradients and a few numbers, summed over ranks; the gradients are divided by `grad_scale`."""

    grad_scale: int

    def begin(self, sums: Tensor) -> None:
        """Forget the gradients of the step before.

        `sums`, (slices, numbers), is to be added up as well; it must be complete before the last backward pass.
        """

    def backward_of(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surrounds the forward and backward pass of a batch, the `last` one of the step or not."""

    def backward(self, loss: Tensor) -> None:
        """The backward pass itself, of the sum over slices of `loss`, (slices,).

        The sum, since torch imports sympy (0.5 s) where a gradient is handed in.
        """

    def finish(self) -> tuple[Tensor, Tensor]:
        """All backward passes are done: `sums` over all slices, and the flat gradients; the caller may change both."""

    def norm(self, gradients: Tensor) -> Tensor:
        """The norm, (), of what `finish` gave, over all ranks where each has a part of the gradients."""


class Optimizer(Protocol):
    """Updates the parameters by flat gradients."""

    def step(self, gradients: Tensor, lr: float | Tensor, finite: Tensor | bool) -> None:
        """Update by gradients, (size,); where `finite` is false, nothing changes."""


class Average(Protocol):
    """Follows the parameters of a model."""

    def update(self, finite: Tensor | bool) -> None:
        """Follow them as they are after an update; where `finite` is false, nothing changes."""


class DeferredSteps(Protocol):
    """Steps of which several are computed together, later than they were taken; their results are there by then.

    `averages`: whether a moving average follows each of them.
    """

    averages: bool

    def hold(self, *, on: bool) -> None:
        """Put steps off from now on, or do so no more; those that were and not computed are dropped."""

    def settle(self, *, wait: bool) -> int | None:
        """Compute what was put off, or send it off; `wait`: until all that was ever sent off is computed.

        The number of steps whose results are not there yet, which are the last ones; None where nothing was to be done.
        """


class Rows(Protocol):
    """Rows to evaluate on, in a fixed order; `weights` (rows,) float64, or None where every row counts 1."""

    @property
    def targets(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def slice(self, start: int, stop: int) -> tuple[Tensor, ...]: ...


class Source(Rows, Protocol):
    """Rows of a split, to train on as well. `row_numbers` are their numbers in the data.

    `mapped_bytes`: pages of files that a pass over all rows brings into memory; `on_device`: whether a batch is
    gathered without the host.
    """

    @property
    def row_numbers(self) -> Tensor: ...
    @property
    def mapped_bytes(self) -> int: ...
    @property
    def on_device(self) -> bool: ...
    def gather(self, share: Any) -> Any: ...


@runtime_checkable
class Ragged(Protocol):
    """A source whose rows have lengths, (rows,) int64 on the CPU: rows of similar length are computed together.

    `padded_lengths` are those that rows are padded to by themselves; rows together are padded to the largest of them.
    `inputs` are those of the rows at the places `index`, (n,).
    """

    @property
    def lengths(self) -> Tensor: ...
    @property
    def padded_lengths(self) -> Tensor: ...
    def inputs(self, index: Tensor) -> tuple[Tensor, ...]: ...


class Scorer(Protocol):
    """What evaluation needs of a task: probabilities of logits, and metrics of probabilities."""

    @property
    def class_names(self) -> list[str]: ...
    @property
    def arithmetic(self) -> Arithmetic: ...
    def probabilities(self, logits: Tensor) -> Tensor: ...
    def metrics(self, probabilities: Tensor, targets: Tensor, weights: Tensor | None = None) -> dict[str, Any]: ...


class Stateful(Protocol):
    """Anything that a checkpoint holds: a flat mapping of tensors and JSON values."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


@runtime_checkable
class Partial(Protocol):
    """A model whose state_dict leaves out what is not trained."""

    def unsaved_state_dict(self) -> Mapping[str, Tensor]:
        """What it leaves out."""


@runtime_checkable
class Collective(Protocol):
    """A model that its ranks compute together: each calls it as often as the others, with any number of rows."""

    collective: bool


Record = dict[str, Any]
Track = Callable[[Record], None]
"""Takes one line of metrics; called by every rank."""
Save = Callable[[int], None]
"""Writes the checkpoint of a step; called by every rank."""
