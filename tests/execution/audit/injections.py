"""Bits that are flipped in one rank of an audited session, one after the other, and how the audit ends each of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_train.accel import cpu_mlp
from dist_train.accel.host_memory import Exchange
from dist_train.distributed.collectives import Collectives
from dist_train.run.session import Session
from dist_train.training.step import EagerStep
from tests.dist.sessions import build
from tests.execution.audit.flips import EVERY, flip_bit, take_steps, wrapped

RESTING = ("weights", "moments", "buffers")
COMPUTED = ("activations", "gradients", "sums")
SHARED = ("sent", "received")


@dataclass
class Flip:
    """A bit that one rank flips: `once`, at an opportunity of an audited step, or at each from a step on.

    `place` chooses the number and `bit` the bit; `chance` is the opportunity. An opportunity is a call of the function
    that `kind` stands for. `at_address`: at each opportunity with that memory, as a bit that is stuck.
    """

    kind: str
    liar: int
    once: bool
    place: int
    bit: int
    chance: int
    at_address: bool
    armed: bool = False
    seen: int = 0
    done: bool = False
    stuck_at: int | None = None

    def take(self, tensor: Tensor) -> None:
        """An opportunity: flip if it is the time."""
        if not self.armed:
            return
        self.seen += 1
        if self.once and (self.done or self.seen <= self.chance):
            return
        self.done = True
        if self.at_address:
            self.stuck_at = self.stuck_at or tensor.data_ptr()
            if tensor.data_ptr() != self.stuck_at:
                return
        flip_bit(tensor, self.place % tensor.numel(), self.bit % (8 * tensor.element_size()))


@dataclass
class Outcome:
    """A flip, the steps until the audit ended the run (None: it did not), and what it said."""

    flip: Flip
    steps: int | None
    fault: str | None


def draw(chooser: random.Random, world: int) -> Flip:
    """A flip, the same on every rank for the same state of the chooser."""
    kind = chooser.choice([*RESTING, *COMPUTED, *(SHARED if world > 1 else ())])
    strong = kind == "activations"  # smaller changes may be rounded away before they change a result
    return Flip(
        kind=kind,
        liar=chooser.randrange(world),
        once=chooser.random() < 0.5 or (kind, world) == ("sums", 1),
        place=chooser.randrange(1 << 20),
        bit=chooser.randrange(16, 31) if strong else chooser.randrange(64),
        chance=chooser.randrange(2) if kind != "received" else chooser.randrange(4),
        at_address=world == 1,  # alone nobody sees what is wrong in the same way twice
    )


def inject(collectives: Collectives, arguments: list[str], seed: int, count: int) -> list[Outcome]:
    """Flips drawn by `seed`, each in a run that begins anew."""
    session = build(collectives, arguments)
    assert take_steps(session, EVERY) is None
    chooser, begin = random.Random(seed), _Snapshot(session)
    outcomes = []
    for _ in range(count):
        flip = draw(chooser, collectives.size)
        outcomes.append(_outcome(session, collectives, flip, offset=0 if flip.once else chooser.randrange(EVERY)))
        begin.restore()
    left = take_steps(session, EVERY)
    assert left is None, left
    return outcomes


def _outcome(session: Session, collectives: Collectives, flip: Flip, offset: int) -> Outcome:
    mine = flip.liar == collectives.rank
    with ExitStack() as stack:
        if mine and flip.kind not in RESTING:
            stack.enter_context(_HOOKS[flip.kind](flip))
        # What is in a computation, once: in the audited step. All else: from any step on.
        before = EVERY - 1 if flip.once and flip.kind not in RESTING else offset
        assert take_steps(session, before) is None
        flip.armed = mine
        first, fault = session.progress.step, None
        while fault is None and session.progress.step < first + 2 * EVERY:
            if mine and flip.kind in RESTING and not (flip.once and flip.done):
                flip.chance = 0
                flip.take(_resting(session, flip))
            fault = take_steps(session, 1)
    return Outcome(flip, None if fault is None else session.progress.step + 1 - first, fault)


def _resting(session: Session, flip: Flip) -> Tensor:
    optimizer = session.optimizer
    if flip.kind == "buffers":
        buffers = [buffer for buffer in session.model.buffers() if buffer.is_floating_point()]  # not indices
        return buffers[flip.place % len(buffers)]
    return optimizer.moments if flip.kind == "moments" else optimizer.parameters.values_between(0, 1 << 30)[0]


class _Snapshot:
    """A session as it stands."""

    def __init__(self, session: Session) -> None:
        self._session = session
        optimizer = session.optimizer
        weights = optimizer.parameters.values_between(0, optimizer.parameters.size)
        self._tensors = [optimizer.moments, optimizer.steps, *weights, *session.model.buffers()]
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._place = session.progress.step, session.progress.position

    @torch.no_grad()
    def restore(self) -> None:
        """The session as it stood."""
        self._session.progress.step, self._session.progress.position = self._place
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        assert self._session.audit is not None
        self._session.audit.note()


def _activations(flip: Flip) -> AbstractContextManager[None]:
    def wrap(plain: Any) -> Any:
        def multiply(block: Any, index: int, layer: Any, *others: Any) -> None:
            plain(block, index, layer, *others)
            if layer.norm is not None or index == len(block.activations) - 1:  # ReLU and dropout hide others
                flip.take(block.pre_activations[index].tensor)

        return multiply

    return wrapped(cpu_mlp, "_multiply", wrap)


def _gradients(flip: Flip) -> AbstractContextManager[None]:
    def wrap(plain: Any) -> Any:
        def accumulate(self: EagerStep, batches: Any, vote: Any, reducer: Any) -> None:
            plain(self, batches, vote, reducer)
            flip.take(getattr(reducer, "_inner", reducer).parts[1])

        return accumulate

    return wrapped(EagerStep, "accumulate", wrap)


def _sums(flip: Flip) -> AbstractContextManager[None]:
    def wrap(plain: Any) -> Any:
        def ordered_sum(self: Collectives, partials: Tensor) -> Tensor:
            found: Tensor = plain(self, partials)
            if found.dtype == torch.float32:  # those of the gradients
                found = found.clone()
                flip.take(found)
            return found

        return ordered_sum

    flip.chance = 0
    return wrapped(Collectives, "ordered_sum", wrap)


def _sent(flip: Flip) -> AbstractContextManager[None]:
    def wrap(plain: Any) -> Any:
        def meet(self: Exchange, tensors: Any, kind: int) -> Any:
            return plain(self, [_changed(tensor, flip) for tensor in tensors], kind)

        return meet

    return wrapped(Exchange, "_meet", wrap)


def _changed(tensor: Tensor, flip: Flip) -> Tensor:
    if tensor.dtype == torch.uint8:  # what the audit says itself
        return tensor
    changed = tensor.detach().clone().contiguous()
    own = changed.view(-1)
    if changed.ndim == 2 and changed.shape[1] == 3 and changed.dtype == torch.float64:
        own = changed[0, :2]  # a step's sums: the vote is nobody else's to compute
    flip.take(own)
    return changed


def _received(flip: Flip) -> AbstractContextManager[None]:
    def wrap(plain: Any) -> Any:
        def all_gather(self: Exchange, tensor: Tensor) -> Tensor:
            found: Tensor = plain(self, tensor)
            if tensor.dtype != torch.uint8:
                flip.take(found)
            return found

        return all_gather

    return wrapped(Exchange, "all_gather", wrap)


_HOOKS: dict[str, Callable[[Flip], AbstractContextManager[None]]] = {
    "activations": _activations,
    "gradients": _gradients,
    "sums": _sums,
    "sent": _sent,
    "received": _received,
}
