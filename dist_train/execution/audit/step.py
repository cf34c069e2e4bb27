"""A step that is computed a second time every N steps, by another rank, before its gradients are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.keyed_random import permutation
from dist_train.distributed.collectives import sum_of_slices
from dist_train.errors import ComputationFault
from dist_train.execution.audit.again import SecondComputation
from dist_train.execution.audit.judge import Digests, Statement, Verdict, judge
from dist_train.execution.audit.memory import RestingMemory, words
from dist_train.execution.audit.tape import RecordingTape
from dist_train.execution.average import MovingAverage
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.execution.optimizer import AdamW
from dist_train.execution.reducers import SliceReducer
from dist_train.training.protocols import Batch
from dist_train.training.step import EagerStep, Step, StepResult
from dist_train.watchdog.processes import host_name

_VOTE = 2
"""The column of a step's sums with the vote to stop: it is a rank's own, and no other one computes it."""


class AuditedReducer:
    """Another reducer; between its sums and their use stands an audit.

    `before` is given this rank's part of the sums, `after` the sums and the gradients, added up over ranks.
    """

    def __init__(
        self, inner: SliceReducer, before: Callable[[Tensor], None], after: Callable[[Tensor, Tensor], None]
    ) -> None:
        self.grad_scale = inner.grad_scale
        self.begin, self.backward_of, self.backward, self.norm = (
            inner.begin, inner.backward_of, inner.backward, inner.norm,
        )  # fmt: skip
        self._inner = inner
        self._before = before
        self._after = after

    def finish(self) -> tuple[Tensor, Tensor]:
        """What the other one gives."""
        self._before(self._inner.parts[0])
        totals, gradients = self._inner.finish()
        self._after(totals, gradients)
        return totals, gradients


class AuditedStep:
    """Another step of the exact mode; a rank that computes wrongly is found and named before anybody updates.

    In each `every`-th step, counted from 1, each rank computes the slices of another one again, in other memory, and
    compares byte for byte what they have added to every `all_gather` of the step: statistics and sums of BatchNorm,
    losses, gradients. Which rank it is depends on (seed, step); a rank alone computes its own slices. What all ranks
    hold alike (weights, moments, buffers, sums) is compared by SHA-256. Where anything differs the slices are computed
    once more, by a third rank where there is one, and `judge` names the wrong one. Of two ranks that both stick to what
    they say, the one is wrong that no longer computes what it has computed in the audit before.

    In every step a rank compares checksums of its weights, moments and buffers with those after its last update.

    `batches_of` gives what a rank trains on in the step at hand.
    """

    def __init__(
        self,
        inner: Step,
        eager: EagerStep,
        model: nn.Module,
        context: ModelContext,
        *,
        every: int,
        seed: int,
        batches_of: Callable[[int], Sequence[Batch]],
    ) -> None:
        reducer, optimizer = eager.reducer, eager.optimizer
        assert isinstance(reducer, SliceReducer)
        assert isinstance(optimizer, AdamW)
        assert isinstance(optimizer.parameters, FlatParameters)
        eager.reducer = AuditedReducer(reducer, self._sound_alarm, self._audit)
        self.inner = inner
        self._collectives = eager.collectives
        self._again = SecondComputation(eager, model, context, optimizer.parameters)
        self._every = every
        self._seed = seed
        self._batches_of = batches_of
        self._step = 0
        self._tape: RecordingTape | None = None
        self._weights = optimizer.parameters.values
        self._known: tuple[list[Tensor], Sequence[Batch], Tensor, Digests] | None = None
        """On two ranks, of the last audit: what was gathered, batches, weights, and what was computed from them."""
        self._held = _held_alike(optimizer, eager, model)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        written_by_forward = {"buffers": self._held["buffers"]}
        others = {name: tensors for name, tensors in self._held.items() if name not in written_by_forward}
        self._buffers = RestingMemory(written_by_forward)
        self._resting = RestingMemory(others)
        self._frozen = RestingMemory({"frozen weights": frozen})
        self._alarm: list[str] = []
        self._frozen.note()

    def __call__(self, batches: Sequence[Batch], step: int, *, wants_stop: bool) -> StepResult:
        """Take the step.

        Raises:
            ComputationFault: a rank is wrong; no rank has updated its weights.
        """
        self._step = step + 1
        self._alarm = self._buffers.changed()
        due = self._step % self._every == 0
        result = self._take(batches, step, wants_stop=wants_stop, audited=due)
        if not result.finite and not due and self._take(batches, step, wants_stop=wants_stop, audited=True).finite:
            raise ComputationFault(
                f"step {self._step}: loss or gradient was not finite, and was finite when it was computed again: "
                f"a rank has computed wrongly, and nobody knows which; {_NOT_SAVED}"
            )
        self._note()
        return result

    def _take(self, batches: Sequence[Batch], step: int, *, wants_stop: bool, audited: bool) -> StepResult:
        self._tape = self._collectives.tape = RecordingTape() if audited else None
        try:
            return self.inner(batches, step, wants_stop=wants_stop)
        except ComputationFault:
            raise
        except Exception as error:
            changed = self._alarm + self._changed_weights()
            if changed:  # the last line is what the report of the watchdog says of this rank
                error.add_note(f"the memory of this rank has changed before that: {', '.join(changed)}")
            raise
        finally:
            self._collectives.tape = None

    def note(self) -> None:
        """What the ranks hold is as it ought to be, and rests: a step has ended, or a checkpoint was restored."""
        self._frozen.note()
        self._note()

    def _note(self) -> None:
        self._resting.note()
        self._buffers.note()

    def changed(self) -> list[str]:
        """What of it has changed by itself since then."""
        return self._buffers.changed() + self._changed_weights()

    def _changed_weights(self) -> list[str]:
        """The same without the buffers, which a forward pass writes to."""
        return self._resting.changed() + self._frozen.changed()

    def require_intact(self) -> None:
        """Compare what the ranks hold alike, between two steps; called by all of them.

        Raises:
            ComputationFault: the memory of a rank has changed, or is not that of the others.
        """
        self._decide(Statement(host=host_name(), alarm=self.changed(), state=self._state()), _NOT_SAVED)

    def _sound_alarm(self, sums: Tensor) -> None:
        """Where this rank's memory has changed, tell the others, by a vote that is no number."""
        self._alarm += self._changed_weights()
        if self._alarm:
            sums[:, _VOTE] = torch.nan

    def _audit(self, totals: Tensor, gradients: Tensor) -> None:
        tape, self._collectives.tape = self._tape, None
        alarmed = bool(totals[_VOTE].isnan())
        if tape is not None and not alarmed:
            self._audit_calls(tape.calls, totals, gradients)
        elif alarmed:
            self._decide(Statement(host=host_name(), alarm=self._alarm), _NOT_TAKEN)

    def _audit_calls(self, calls: list[Tensor], totals: Tensor, gradients: Tensor) -> None:
        size, rank = self._collectives.size, self._collectives.rank
        first, *more = self._shifts()

        def parts_of(shift: int) -> tuple[int, list[Tensor]]:
            whose = (rank + shift) % size
            return whose, _without_votes(self._again.parts(calls, self._batches_of(whose)))

        whose, parts = parts_of(first)
        received = _without_votes(calls)
        sums_again = [sum_of_slices(call) for call in calls[-2:]]
        objects = not all(map(_same_bytes, parts, [call[whose] for call in received]))
        objects |= not all(map(_same_bytes, (totals, gradients), sums_again))
        if self._all_agree(calls, totals, gradients, objects=objects):
            if size == 2:
                self._known = calls, self._batches_of(whose), self._weights.clone(), _digests(parts)
            return
        computed = [(whose, _digests(parts))]
        for shift in more:
            whose, parts = parts_of(shift)
            computed.append((whose, _digests(parts)))
        said = Statement(
            host=host_name(),
            state=self._state(),
            received=_digests([call.flatten(0, 1) for call in received]),
            computed=computed,
            sums=_digest([totals, gradients]),
            sums_again=_digest(sums_again),
            objects=objects,
            unlike_before=self._is_unlike_before(),
        )
        self._decide(said, _NOT_TAKEN)

    def _is_unlike_before(self) -> bool:
        """Whether this rank no longer computes what it has computed in an audit in which both ranks agreed."""
        if self._known is None:
            return False
        calls, batches, weights, digests = self._known
        return _digests(_without_votes(self._again.parts(calls, batches, weights))) != digests

    def _shifts(self) -> list[int]:
        """How many ranks further those stand whose slices are computed again: at once, and where anything differs."""
        size = self._collectives.size
        if size < 3:
            return [0, 0] if size == 1 else [1, 0, 1]
        return [1 + n for n in permutation(size - 1, "audit", self._seed, self._step)[:2].tolist()]

    def _all_agree(self, calls: Sequence[Tensor], totals: Tensor, gradients: Tensor, *, objects: bool) -> bool:
        """Whether no rank objects, and all have received and hold the same bytes."""
        if self._collectives.size == 1:
            return not objects
        own = _sha256([*calls, totals, gradients, *(t for held in self._held.values() for t in held)]).digest()
        of_all = self._collectives.all_gather(torch.tensor([objects, *own], dtype=torch.uint8))
        return not of_all[:, 0].any() and bool((of_all == of_all[0]).all())

    def _state(self) -> dict[str, str]:
        return {name: _digest(tensors) for name, tensors in self._held.items()}

    def _decide(self, own: Statement, consequence: str) -> None:
        said = self._collectives.all_gather_object(lambda: own)
        verdict = judge(said)
        if verdict is not None:
            raise ComputationFault(_message(self._step, verdict, [one.host for one in said], consequence))


_NOT_TAKEN = "no rank has updated its weights by this step"
_NOT_SAVED = "nothing was saved"


def _message(step: int, verdict: Verdict, hosts: Sequence[str], consequence: str) -> str:
    ranks = [f"rank {rank} (host {hosts[rank]})" for rank in verdict.ranks]
    joined = (" and " if verdict.certain else " or ").join(ranks)
    wrong = "are" if verdict.certain and len(ranks) > 1 else "is"
    advice = "Leave the host out" if verdict.certain else "Test these hosts, or train on more ranks"
    return (
        f"step {step}: {joined} {wrong} wrong: {verdict.what}; {consequence}. {advice}: "
        "the same command continues from the last checkpoint"
    )


def _held_alike(optimizer: AdamW, eager: EagerStep, model: nn.Module) -> dict[str, list[Tensor]]:
    """What all ranks hold alike, by what messages call it."""
    layout, buffers = optimizer.parameters, list(model.buffers())
    held = {"weights": layout.values_between(0, layout.size), "moments": [optimizer.moments, optimizer.steps]}
    if isinstance(eager.average, MovingAverage):
        held["moving average"] = eager.average.values
        buffers += eager.average.module.buffers()
    return held | {"buffers": buffers}


def _without_votes(calls: Sequence[Tensor]) -> list[Tensor]:
    """What is gathered in a step; the last two calls are its sums and its gradients."""
    *others, sums, gradients = calls
    return [*others, sums[..., :_VOTE], gradients]


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(words(one), words(other))


def _digests(calls: Sequence[Tensor]) -> Digests:
    return [[_digest([of_slice]) for of_slice in call] for call in calls]


def _digest(tensors: Iterable[Tensor]) -> str:
    return _sha256(tensors).hexdigest()


def _sha256(tensors: Iterable[Tensor]) -> hashlib._Hash:
    found = hashlib.sha256()
    for tensor in tensors:
        of_numpy: Any = words(tensor).numpy()
        found.update(of_numpy)
    return found
