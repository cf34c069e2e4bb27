"""Why a row has its score: integrated gradients of its log-odds, summed over what each column of the table became.

Sundararajan, Taly and Yan 2017, "Axiomatic Attribution for Deep Networks". The path leads from a typical row (medians,
most frequent categories, nothing missing) to the row. Numbers and missing flags move along it as a model gets them;
category codes cannot, so what the model's first modules make of them does: those that say, in `output_columns`, which
column each of their outputs is of. The effects of a row's columns add up to its log-odds less those of the typical row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import UserError
from dist_train.risk.calibration import Calibration, Isotonic, Temperature, Vector

# Pieces of the path; rows whose effects do not add up to within TOLERANCE are computed again with more of them.
NUM_PIECES = (16, 64, 256)
TOLERANCE = 5e-3
# Rows times points that pass through the models at once.
_ROWS_AT_ONCE = 4096
_TINY = torch.finfo(torch.float64).tiny

Inputs = tuple[Tensor, ...]
Columns = Sequence[Sequence[str] | None]
"""Of each input of a model the columns that its values are of; None of an input of codes, which do not move."""


@dataclass(frozen=True)
class _Path:
    """The way from the typical row to rows: `inputs` of the rows, and what moves: `base`, `changes` and its columns."""

    inputs: Inputs
    base: list[Tensor]
    changes: list[Tensor]
    columns: list[Tensor]

    def at(self, places: Tensor) -> list[Tensor]:
        """What moves, (places * rows, values) each, at shares of the way, (places,)."""
        pairs = zip(self.base, self.changes, strict=True)
        return [(base + places[:, None, None] * change).flatten(0, 1) for base, change in pairs]


class ExplainedModel:
    """A model whose outputs follow rows on the path from a typical row.

    `typical` are the model's inputs of that row, each (1, ...); `columns` says what they are of, and `places` has the
    number of each column. `probabilities` turns logits into (rows, classes) float64. It works on a float32 copy of the
    model, and several threads may use it at once.

    Raises:
        UserError: the model reads category codes by modules that do not say which columns their outputs are of.
    """

    def __init__(
        self,
        model: nn.Module,
        probabilities: Callable[[Tensor], Tensor],
        typical: Inputs,
        columns: Columns,
        places: Mapping[str, int],
    ) -> None:
        self._model = deepcopy(model).float().eval().requires_grad_(False)
        self._probabilities = probabilities
        self._moves = [names is not None for names in columns]
        self._thread = _Thread()
        modules = list(_outermost(self._model))
        codes = sum(x.shape[1] for x, moves in zip(typical, self._moves, strict=True) if not moves)
        if codes and not modules:
            raise UserError(
                "reasons: the model reads category codes by modules of its own: it has to take them by "
                "dist_train.TabularInputs"
            )
        for module in modules:
            module.register_forward_hook(self._exchange)
        device = typical[0].device
        self._base = self._values(self._moving(typical))
        names = [*(names for names in columns if names is not None), *(m.output_columns for m in self._thread.called)]
        self._columns = [
            torch.tensor([places[name] for name in of_values], dtype=torch.int64, device=device) for of_values in names
        ]

    def path(self, inputs: Inputs) -> _Path:
        """The path to rows."""
        moving = self._moving(inputs)
        ends = self._values(moving)
        changes = [end - begin for begin, end in zip(self._base, ends, strict=True)]
        return _Path(moving, self._base, changes, self._columns)

    def at(self, path: _Path, values: Sequence[Tensor]) -> Tensor:
        """Probabilities, (places * rows, classes), where what moves has `values`."""
        times = len(values[0]) // len(path.inputs[0])
        given = iter(values)
        inputs = [
            next(given) if moves else x.repeat(times, *[1] * (x.ndim - 1))
            for x, moves in zip(path.inputs, self._moves, strict=True)
        ]
        with self._thread.giving(given):
            return self._probabilities(self._model(*inputs))

    def _moving(self, inputs: Inputs) -> Inputs:
        return tuple(x.float() if moves else x for x, moves in zip(inputs, self._moves, strict=True))

    @torch.no_grad()
    def _values(self, inputs: Inputs) -> list[Tensor]:
        """What moves: the inputs that do, and the outputs of the modules that read codes."""
        self._thread.kept, self._thread.called = [], []
        self._model(*inputs)
        return [*(x for x, moves in zip(inputs, self._moves, strict=True) if moves), *self._thread.kept]

    def _exchange(self, module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return self._thread.exchange(module, output)


class _Thread(threading.local):
    """What the hooks do in one thread: give other outputs for those of modules, or else keep them."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.called: list[Any] = []
        self._given: Iterator[Tensor] | None = None

    def exchange(self, module: nn.Module, output: Tensor) -> Tensor | None:
        if self._given is not None:
            return next(self._given)
        self.kept.append(output)
        self.called.append(module)
        return None

    @contextmanager
    def giving(self, outputs: Iterator[Tensor]) -> Iterator[None]:
        self._given = outputs
        try:
            yield
        finally:
            self._given = None


def has_slopes(calibration: Calibration | None) -> bool:
    """Whether calibrated log-odds can be explained: not those of isotonic steps."""
    return not isinstance(calibration, Isotonic)


def log_odds(probabilities: Tensor, positive: int, calibration: Calibration | None = None) -> Tensor:
    """Log-odds of a class after a calibration that has slopes, (rows,) float64, of probabilities (rows, classes)."""
    others = [k for k in range(probabilities.shape[1]) if k != positive]
    scales: Any = 1.0
    biases: Any = 0.0
    if isinstance(calibration, Temperature):
        scales = 1 / calibration.temperature
    elif isinstance(calibration, Vector):
        scales, biases = probabilities.new_tensor(calibration.scales), probabilities.new_tensor(calibration.biases)
    changed = calibration is not None and calibration != Temperature(1.0)
    smallest = 1e-12 if changed else 0.0  # as in the calibration
    logits = (probabilities + smallest).clamp_min(_TINY).log() * scales + biases
    return torch.sub(logits[:, positive], logits[:, others].logsumexp(1))


def effects_of(
    models: Sequence[ExplainedModel],
    inputs: Sequence[Inputs],
    num_columns: int,
    positive: int,
    calibration: Calibration | None = None,
) -> tuple[Tensor, float]:
    """Effects of the columns on the log-odds of class `positive`, (rows, columns) float64 on the CPU, and the log-odds
    of the typical row.

    The log-odds are those of the mean of the models' probabilities. `inputs` are the rows as each model gets them. A
    row's effects do not depend on the other rows, but for rounding.
    """
    effects = torch.zeros(len(inputs[0][0]), num_columns, dtype=torch.float64)
    left, begin = torch.arange(len(effects)), float("nan")
    for pieces in NUM_PIECES:
        if not len(left):
            break
        imprecise = []
        for index in left.split(max(1, _ROWS_AT_ONCE // (pieces * len(models)))):
            paths = [
                model.path(tuple(x[index.to(x.device)] for x in of_model))
                for model, of_model in zip(models, inputs, strict=True)
            ]
            found, way, begin = _integrated(models, paths, num_columns, positive, calibration, pieces)
            effects[index] = found
            imprecise.append(index[(way - found.sum(1)).abs() > TOLERANCE])
        left = torch.cat(imprecise)
    return effects, begin


def _integrated(
    models: Sequence[ExplainedModel],
    paths: Sequence[_Path],
    num_columns: int,
    positive: int,
    calibration: Calibration | None,
    pieces: int,
) -> tuple[Tensor, Tensor, float]:
    """Effects, the log-odds of the rows less those of the typical row, and the latter."""
    rows, device = len(paths[0].inputs[0]), paths[0].inputs[0].device
    places = torch.linspace(0, 1, pieces + 1, device=device)
    values = [[value.requires_grad_() for value in path.at(places)] for path in paths]
    made = [model.at(path, own) for model, path, own in zip(models, paths, values, strict=True)]
    scores = log_odds(torch.stack(made).mean(0), positive, calibration)
    flat = [value for own in values for value in own]
    found = torch.autograd.grad(scores.sum(), flat, allow_unused=True, materialize_grads=True)
    slopes = [slope.view(pieces + 1, rows, -1) for slope in found]
    changes = [change for path in paths for change in path.changes]
    columns = [of_values for path in paths for of_values in path.columns]
    pairs = list(zip(slopes, changes, strict=True))
    along = torch.stack([torch.einsum("prv,rv->pr", slope, change) for slope, change in pairs]).double().sum(0)
    scores = scores.detach().view(pieces + 1, rows)
    weights = _weights(scores, along / pieces) / pieces
    effects = torch.zeros(rows, num_columns, dtype=torch.float64, device=device)
    for (slope, change), of_values in zip(pairs, columns, strict=True):
        mean = torch.einsum("pr,prv->rv", weights.float(), slope)
        effects.index_add_(1, of_values, (mean * change).double())
    return effects.cpu(), (scores[-1] - scores[0]).cpu(), float(scores[0, 0])


def _weights(scores: Tensor, along: Tensor) -> Tensor:
    """Of each point of the path, (points, rows), in numbers of pieces.

    The mean of the slopes at both ends of a piece is weighted so that it gives the change of the score over the piece:
    the slopes of a network of ReLUs are constant up to a kink and behind it, and the weights are then the parts of the
    piece before and behind it. `along` are the changes that the slopes at the points give for a piece.
    """
    change, first, second = scores.diff(dim=0), along[:-1], along[1:]
    differs = (first - second).abs() > _TINY
    before = torch.where(differs, (change - second) / torch.where(differs, first - second, 1.0), 0.5).clamp(0, 1)
    weights = torch.zeros_like(along)
    weights[:-1] += before
    weights[1:] += 1 - before
    return weights


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that say which columns their outputs are of, without those inside of others."""
    if hasattr(model, "output_columns"):
        yield model
        return
    for child in model.children():
        yield from _outermost(child)
