"""The audit finds a wrong bit within its period, names the rank, and leaves no trace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_train.config.load import load_config
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import ComputationFault
from dist_train.execution.optimizer import AdamW
from dist_train.execution.reducers import SliceReducer
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.job import train
from dist_train.run.session import Session
from tests.dist.sessions import build
from tests.execution.audit.flips import EVERY, flip_bit, honest, small_job, take_steps
from tests.execution.audit.injections import Outcome, inject
from tests.ranks import on_ranks
from tests.resume.jobs import tiny_job, write_table

ALONE = World()
ONE_PASS = ("train.class_weights=balanced", "model.embedding_dim=2", "train.label_smoothing=0.1")


def named(outcome: Outcome) -> list[int]:
    """The ranks that a fault names."""
    return [int(rank) for rank in re.findall(r"rank (\d+) \(host", outcome.fault or "")]


def check(outcomes: list[Outcome], world: int) -> None:
    """Each was found within the period, and names the rank that was wrong.

    Of two ranks that hold other sums, or receive other bytes, whenever they are asked, both may be named.
    """
    for outcome in outcomes:
        assert outcome.steps is not None, outcome
        assert outcome.steps <= EVERY, outcome
        liar = outcome.flip.liar
        undecided = world == 2 and not outcome.flip.once and outcome.flip.kind in ("sums", "received")
        assert named(outcome) == [liar] or (undecided and liar in named(outcome)), outcome


@pytest.mark.parametrize(
    ("world", "count"),
    [
        (3, 12),
        pytest.param(1, 60, marks=pytest.mark.slow),
        pytest.param(2, 70, marks=pytest.mark.slow),
        pytest.param(3, 70, marks=pytest.mark.slow),
        pytest.param(6, 70, marks=pytest.mark.slow),
    ],
)
def test_flipped_bits_are_found_within_the_period_and_the_rank_is_named(tmp_path: Path, world: int, count: int) -> None:
    for outcomes in on_ranks(world, inject, small_job(tmp_path), world, count):
        assert len(outcomes) == count
        check(outcomes, world)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "steps"), [(1, 2000), (2, 300), (3, 200)])
@pytest.mark.parametrize("model", ["financial_classifier", "tabm", "resnet"])
def test_honest_ranks_are_left_alone(tmp_path: Path, world: int, steps: int, model: str) -> None:
    arguments = small_job(tmp_path, f"model.name={model}", *ONE_PASS, every=2)
    assert on_ranks(world, honest, arguments, steps) == [(steps, None)] * world


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_thousand_honest_steps_raise_no_alarm(tmp_path: Path) -> None:
    taken = {1: 0, 2: 0, 3: 0}
    alarms = []
    for world, runs, steps in ((3, 16, 500), (2, 4, 500), (1, 19, 10_000)):
        for seed in range(runs):
            arguments = small_job(tmp_path, f"run.seed={seed}", "train.epochs=10000", every=10)
            ends = on_ranks(world, honest, arguments, steps)
            taken[world] += ends[0][0]
            alarms += [fault for _, fault in ends if fault]
            print(f"steps by the number of ranks: {taken}; alarms: {alarms}", flush=True)
    assert sum(taken.values()) == 200_000
    assert alarms == []


def tensors_after(collectives: Collectives, arguments: list[str], steps: int) -> dict[str, Tensor]:
    """Everything of a checkpoint, and what no checkpoint has, after some steps."""
    session = build(collectives, arguments)
    generators = torch.get_rng_state()
    assert take_steps(session, steps) is None
    assert torch.equal(generators, torch.get_rng_state())
    parts = {f"{part}/{name}": x for part, of in session.tensor_parts().items() for name, x in of.items()}
    grads = {f"grad/{n}": p.grad for n, p in session.model.named_parameters() if p.grad is not None}
    return {name: value.clone() for name, value in (parts | grads).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("virtual_ranks", [1, 6])
@pytest.mark.parametrize(
    "model",
    [
        "financial_classifier",
        pytest.param("resnet", marks=pytest.mark.slow),
        pytest.param("tabm", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_the_same_bits_with_the_audit(tmp_path: Path, model: str, virtual_ranks: int) -> None:
    more = (f"model.name={model}", "train.accumulation_steps=2", "train.ema_decay=0.9", *ONE_PASS)
    more += (f"train.virtual_ranks={virtual_ranks}",)
    alone = Collectives(ALONE)
    without = tensors_after(alone, small_job(tmp_path, *more, every=None), 9)
    with_audit = tensors_after(alone, small_job(tmp_path, *more, every=2), 9)
    assert without.keys() == with_audit.keys()
    for name, value in without.items():
        assert torch.equal(value, with_audit[name]), name


def wrong_update(collectives: Collectives, arguments: list[str], liar: int) -> list[str | None]:
    """A rank whose update flips a bit of a weight, unseen by its checksums; how its steps and a save end."""
    session = build(collectives, arguments)
    plain = AdamW.step

    def step(self: AdamW, gradients: Tensor, lr: float, finite: bool) -> None:
        plain(self, gradients, lr, finite)
        if self.steps_taken == 1:
            flip_bit(self.parameters.values_between(0, 1)[0], 0, 2)

    if collectives.rank == liar:
        AdamW.step = step  # type: ignore[assignment, method-assign]
    steps = take_steps(session, 1)
    saved = None
    try:
        session.tensor_parts()
    except ComputationFault as fault:
        saved = str(fault)
    return [steps, saved, take_steps(session, EVERY)]


def test_a_wrong_update_is_found_before_it_is_saved_and_at_the_next_audit(tmp_path: Path) -> None:
    for steps, saved, later in on_ranks(3, wrong_update, small_job(tmp_path), 1):
        assert steps is None
        assert saved is not None
        assert "rank 1 (host" in saved
        assert "nothing was saved" in saved
        assert later is not None
        assert later.startswith(f"step {EVERY}: rank 1 (host")


def test_memory_that_changes_after_a_checkpoint_was_restored_is_found(tmp_path: Path) -> None:
    session = build(Collectives(ALONE), small_job(tmp_path))
    parts = session.tensor_parts() | {"state.json": {"progress": session.progress.state_dict()}}
    session.restore(parts)
    flip_bit(session.optimizer.moments, 7, 0)
    fault = take_steps(session, 1)
    assert fault is not None
    assert "memory has changed that nobody wrote to: moments" in fault


def test_a_loss_that_is_wrongly_not_finite_is_no_fault_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = build(Collectives(ALONE), small_job(tmp_path, every=1000))
    finish, calls = SliceReducer.finish, []

    def once(self: SliceReducer) -> tuple[Tensor, Tensor]:
        totals, gradients = finish(self)
        calls.append(None)
        return totals, gradients.fill_(torch.inf) if len(calls) == 1 else gradients

    monkeypatch.setattr(SliceReducer, "finish", once)
    fault = take_steps(session, 1)
    assert fault is not None
    assert "was not finite, and was finite when it was computed again" in fault


def test_a_run_that_was_ended_says_why_in_its_report_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    arguments = tiny_job(write_table(tmp_path / "table.csv"), run, "train.max_steps=12", "train.virtual_ranks=4")
    config = load_config([*arguments, "runtime.audit_every_steps=4"])
    sessions: list[Session] = []
    audited = Session._audited

    def kept(self: Session, *others: object) -> object:
        sessions.append(self)
        return audited(self, *others)  # type: ignore[arg-type]

    rate = AdamW.step

    def step(self: AdamW, gradients: Tensor, lr: float, finite: bool) -> None:
        rate(self, gradients, lr, finite)
        if sessions[0].progress.step == 6:  # step 7, whose checksums are there by the next one
            monkeypatch.setattr(sessions[0].audit, "changed", lambda: ["weights"])

    monkeypatch.setattr(Session, "_audited", kept)
    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "step", step)
        with pytest.raises(ComputationFault, match=r"step \d+: rank 0 .* is wrong: memory has changed"):
            train(config, ALONE, {})
    report = (run / "fault.txt").read_text()
    assert "memory has changed that nobody wrote to: weights" in report
    assert max(Checkpoints(run / "checkpoints", 2, lambda: None).steps()) == 5
    summary = train(config, ALONE, {})
    plain = train(load_config([*arguments, "run.name=plain"]), ALONE, {})
    assert summary is not None
    assert plain is not None
    assert summary["weights_sha256"] == plain["weights_sha256"]
