"""Parts of the probe that check one process: what is recorded when, and that recorded steps are the eager ones."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import workload
from dist_train.data.dataset import Dataset
from dist_train.data.encoding.encoder import Inputs
from dist_train.data.sampler import MicroBatchIndices
from dist_train.data.sources import MappedRows
from dist_train.determinism.position import Position
from dist_train.execution.recorded import GraphStep
from dist_train.run.session import Session
from dist_train.training.loss import Objective
from tools.gpu.gpu_place import (
    COMPARED,
    SETTLED,
    Place,
    Result,
    Trainer,
    check,
    eager_step,
    inner_step,
    numbers,
    replays,
    same_weights,
    weights,
)
from tools.gpu.gpu_speed import PRECISIONS_AND_MODES, as_in_a_command, in_float64


def _near_the_end(session: Session, steps: int) -> Position:
    """So many full steps before the last step of an epoch."""
    return Position(0, (session.feed.steps_per_epoch - 1 - steps) * session.config.train.global_batch_size)


def _compared(
    place: Place, batch: int, steps: int, before_the_end: int, *more: str, data: Dataset | None = None
) -> tuple[Session, str]:
    """A session after steps across the end of an epoch, and in what it differs from one whose steps are eager."""
    session, other = (place.session(batch, *COMPARED, *more, data=data) for _ in range(2))
    start = _near_the_end(session, before_the_end)
    act, expected = Trainer(session, start=start), Trainer(other, eager_step(other), start=start)
    differs = [number for number in range(steps) if numbers(act()) != numbers(expected())]
    if differs:
        return session, f"steps {differs[:5]} of {steps} are not the eager ones"
    return session, "" if same_weights(weights(session), weights(other)) else "the weights are not the eager ones"


def shapes(place: Place) -> Result:
    """Are full steps recorded when a run goes on at the ragged end of an epoch, and are they the eager steps?"""
    session, differs = _compared(place, 1000, SETTLED + 4, before_the_end=0)
    recorded = bool(replays(session))
    session.close()
    said = f"after a ragged first step the full ones are {'' if recorded else 'not '}recorded; {differs or 'same bits'}"
    return check(recorded and not differs, said)


def modes(place: Place) -> Result:
    """Recorded steps of 1,000 rows, and of a ragged tail, in each precision and mode: are they the eager ones?"""
    wrong = []
    for name, more in PRECISIONS_AND_MODES.items():
        if place.short and name == "bf16":
            continue  # the CPU takes 0.1 s a step
        data = in_float64(place.data) if name == "float64" else place.data
        with as_in_a_command(place, on=name.startswith("exact")):
            session, differs = _compared(place, 1000, SETTLED + 4, SETTLED, *more, data=data)
            recorded = bool(replays(session)) or session.config.train.accumulation_steps > 1
            session.close()
        if differs or not recorded:
            wrong.append(f"{name}: {differs or 'not recorded'}")
    return check(not wrong, "; ".join(wrong) or "same bits in all of them")


def longer_tail(place: Place) -> Result:
    """Is the memory that a recorded step reads kept when a longer batch comes, as a tail of one row makes it?"""
    batch = 513  # 262,144 rows leave a tail of one, which joins the batch before it
    assert workload.NUM_ROWS % batch == 1
    session = place.session(batch)
    act = Trainer(session, start=_near_the_end(session, SETTLED))
    for _ in range(SETTLED):
        act()
    read = [weakref.ref(tensor) for tensor in session.execution.context.random.sequences]
    for _ in range(2):
        act()
    recorded, freed = bool(replays(session)), sum(tensor() is None for tensor in read)
    session.close()
    crossing, differs = _compared(place, batch, 2 * SETTLED, before_the_end=SETTLED)
    crossing.close()
    said = f"{freed} of {len(read)} tensors that recorded kernels read were given back; {differs or 'same bits'}"
    return check(recorded and not freed and not differs, said if recorded else f"nothing was recorded; {said}")


def continued(place: Place) -> Result:
    """A session that takes over the state of another: is its step recorded again, and are the weights the same?"""
    whole = place.session(1024, *COMPARED)
    act = Trainer(whole)
    for _ in range(SETTLED):
        act()
    parts = {name: dict(part.state_dict()) for name, part in whole._tensors.items()}
    parts = {name: {key: _copied(value) for key, value in part.items()} for name, part in parts.items()}
    after = place.session(1024, *COMPARED)
    for name, part in after._tensors.items():
        part.load_state_dict(parts[name])
    again = Trainer(after, start=Position(0, SETTLED * 1024))
    again.count = SETTLED
    differs = [number for number in range(2 * SETTLED) if numbers(act()) != numbers(again())]
    recorded, same = bool(replays(after)), same_weights(weights(after), weights(whole))
    whole.close()
    after.close()
    said = f"{'' if recorded else 'not '}recorded again, {'same' if same else 'other'} weights"
    said += f", steps that differ: {differs}"
    return check(recorded and same and not differs, said)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


def not_finite(place: Place) -> Result:
    """A recorded step whose loss is not finite: it says so, and updates nothing."""
    session = place.session(1024, *COMPARED)
    act = Trainer(session)
    for _ in range(SETTLED):
        act()
    before = weights(session)
    batch = next(session.feed.steps(Position(0, SETTLED * 1024)))[0][0]
    features = session.task.splits["train"].slice(0, 2**62)[0]
    row = int(batch.index[0])
    kept = features[row].clone()
    features[row] = torch.nan
    try:
        result = act()
        finite = bool(result.finite)
    finally:
        features[row] = kept
    trained = {name for name, _ in session.model.named_parameters()}
    untouched = all(
        torch.equal(value, before[name]) for name, value in session.scored.state_dict().items() if name in trained
    )
    recorded, finite_again = bool(replays(session)), bool(act().finite)
    session.close()
    said = f"finite: {finite}, then {finite_again}; parameters {'untouched' if untouched else 'CHANGED'}"
    return check(recorded and not finite and untouched, said if recorded else f"nothing was recorded; {said}")


def pinned_turns(place: Place) -> Result:
    """Batches of a store that are all on their way before the first is looked at."""
    count = 40_000
    numeric = torch.arange(count * 50, dtype=torch.float32).view(count, 50)
    tensors = {"numeric": numeric, "targets": (torch.arange(count) % 7).to(torch.uint8), "rows": torch.arange(count)}

    def to_inputs(tensors: Mapping[str, Tensor]) -> Inputs:
        empty = tensors["numeric"][:, :0]
        return Inputs(tensors["numeric"], empty, empty)

    rows = MappedRows(tensors, to_inputs, place.device, torch.float32)
    sizes = (30_000, 7, 40_000, 0, 9_000) * (1 if place.short else 6)
    shares = [MicroBatchIndices(torch.randperm(count)[:n], (n,), 0, 0, n) for n in sizes]
    batches = [rows.gather(share) for share in shares]
    sent = [batch.inputs[0] for batch in batches]  # a batch is read when it is looked at
    wrong = [i for i, share in enumerate(shares) if not torch.equal(sent[i].cpu(), numeric[share.rows])]
    return check(not wrong, f"{len(shares)} batches in flight, wrong: {wrong or 'none'}")


def waits(place: Place) -> Result:
    """Does a step make the host wait for the GPU? The modes of `variants`, by torch's own debug mode."""
    if not place.on_gpu:
        return check(True, "needs a GPU")
    found: dict[str, list[str]] = {}
    for name, more in PRECISIONS_AND_MODES.items():
        if name == "float64":
            continue  # as float32, on rows of another type
        with as_in_a_command(place, on=name.startswith("exact")):
            session = place.session(1024, *more)
            act = Trainer(session)
            for _ in range(SETTLED):
                act()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    act()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            session.close()
        places = [
            f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}"
            for w in caught
            if "called a synchronizing" in str(w.message)
        ]
        if places:
            found[name] = places
    return check(
        not found,
        "; ".join(f"{name} waits at {', '.join(at)}" for name, at in found.items()) or "none waits",
        places=found,
    )


def _reads_in_a_capture(objective: Objective, place: Place) -> Objective:
    """An objective that asks for a number while a step is recorded, which CUDA refuses."""

    def reading(logits: Tensor, targets: Tensor, slices: tuple[int, ...], weights: Tensor | None = None) -> Any:
        loss, weight = objective(logits, targets, slices, *(() if weights is None else (weights,)))
        if place.on_gpu and torch.cuda.is_current_stream_capturing():
            loss.sum().item()
        return loss, weight

    return reading


class _Refuses:
    """A recorder that cannot record."""

    def use_stream(self) -> None:
        """The CPU has no streams."""

    def record(self, _launch: Any) -> Any:
        """As CUDA does where a capture is broken off."""
        raise RuntimeError("operation not permitted when stream is capturing")


def fallback(place: Place) -> Result:
    """A step that cannot be recorded: training goes on, on the same stream, to the same numbers."""
    session, other = place.session(256, *COMPARED), place.session(256, *COMPARED)
    step = inner_step(session)
    assert isinstance(step, GraphStep)
    step._eager.objective = _reads_in_a_capture(step._eager.objective, place)
    if not place.on_gpu:
        step._recorder = _Refuses()
    before = torch.cuda.current_stream() if place.on_gpu else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act, expected = Trainer(session), Trainer(other, eager_step(other))
        differs = [number for number in range(SETTLED + 4) if numbers(act()) != numbers(expected())]
    warned = [str(w.message) for w in caught if "recorded" in str(w.message)]
    same_stream = before is None or torch.cuda.current_stream() == before
    if before is not None:
        torch.cuda.set_stream(before)
    recorded = bool(replays(session))
    left = _left_behind(place)
    said = f"steps that differ: {differs}, warned {len(warned)} time(s), {'same' if same_stream else 'ANOTHER'} stream"
    said += f", left behind: {', '.join(left) or 'nothing'}"
    return check(not recorded and not differs and len(warned) == 1 and same_stream and not left, said, warnings=warned)


def _left_behind(place: Place) -> list[str]:
    """What a capture that broke off has left in torch's own state: its generator or its allocator may believe in it."""
    if not place.on_gpu:
        return []
    left = []
    try:
        torch.zeros(1, device=place.device).uniform_()
    except RuntimeError as error:
        left.append(f"the generator refuses ({str(error).splitlines()[0]})")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.empty(2**28, dtype=torch.uint8, device=place.device)
    torch.cuda.empty_cache()
    if torch.cuda.memory_reserved() > before:
        left.append("the allocator gives no memory back")
    return left
