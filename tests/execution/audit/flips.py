"""Sessions that are audited, and bits that are flipped in one of their ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.distributed.collectives import Collectives
from dist_train.errors import ComputationFault
from dist_train.run.session import Session
from tests.dist.sessions import build, write_table

EVERY = 3


def small_job(folder: Path, *more: str, every: int | None = EVERY) -> list[str]:
    """Arguments of a small job, audited in each so many steps."""
    table = write_table(folder / "clients.parquet", 96)
    audit = [] if every is None else [f"runtime.audit_every_steps={every}"]
    return [
        *table, "train.epochs=1000", "train.global_batch_size=24", "train.virtual_ranks=6", "model.hidden_dim=16",
        *audit, *more,
    ]  # fmt: skip


def take_steps(session: Session, count: int) -> str | None:
    """Take steps from where the session stands; the fault that has ended them, None: there was none."""
    progress = session.progress
    for (batches, position), _ in zip(session.feed.steps(progress.position), range(count), strict=False):
        try:
            session.step(batches, progress.step, wants_stop=False)
        except ComputationFault as fault:
            return str(fault)
        progress.step += 1
        progress.position = position
    return None


def flip_bit(tensor: Tensor, number: int, bit: int) -> None:
    """Flip a bit of one number of a contiguous tensor, whatever autograd and checksums think of it."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().view(-1).view(words[tensor.element_size()])
    mask = 1 << bit
    top = 8 * tensor.element_size() - 1
    flat[number] ^= mask if bit < top else -(1 << top)


@contextmanager
def wrapped(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """A function of a module or class, replaced inside the block by `wrap` of it."""
    plain = getattr(owner, name)
    setattr(owner, name, wrap(plain))
    try:
        yield
    finally:
        setattr(owner, name, plain)


def honest(collectives: Collectives, arguments: list[str], count: int) -> tuple[int, str | None]:
    """Steps taken, and the fault that has ended them."""
    session = build(collectives, arguments)
    fault = take_steps(session, count)
    return session.progress.step, fault
