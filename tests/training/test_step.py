"""The step against a loop as torch's tutorials write it, objective and optimizer against torch's functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.batch_norm import sync_batch_norm, zero_grad_of_biases_before_batchnorm
from dist_train.determinism.keyed_random import seeded
from dist_train.determinism.position import Position, split_evenly
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import TrainingFault
from dist_train.execution.average import MovingAverage
from dist_train.execution.base import bind
from dist_train.execution.optimizer import AdamW, lr_multipliers, undecayed_parameters
from dist_train.execution.reducers import DDPReducer, SliceReducer
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.training.loop import Intervals, Loop
from dist_train.training.loss import CrossEntropy, LossSum, balanced_weights
from dist_train.training.meter import Meter
from dist_train.training.progress import Progress
from dist_train.training.protocols import GradientReducer
from dist_train.training.step import EagerStep, StepResult
from tests.ranks import on_ranks
from tests.training.fakes import FakeBatch, FakeFeed, fake_batch

F64 = torch.float64
ADAMW: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-8}
WEIGHTS = torch.tensor([0.5, 1.0, 2.5], dtype=F64)


def data(step: int, rows: int = 24) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(step)
    return torch.from_numpy(rng.normal(size=(rows, 6))), torch.from_numpy(rng.integers(0, 3, rows))


def classifier() -> FinancialClassifier:
    with seeded("test"):
        return FinancialClassifier(6, 8, 3, (0.0, 0.0)).double()


def without_batch_norm() -> nn.Module:
    with seeded("test"):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def rate(step: int) -> float:
    return 1e-2 / (1 + step)


def build_step(
    model: nn.Module, collectives: Collectives | None = None, max_grad_norm: float | None = 0.5, **objective: Any
) -> EagerStep:
    collectives = collectives or Collectives(World())
    optimizer = AdamW(model, weight_decay=0.1, undecayed=undecayed_parameters(model), **ADAMW)
    context = ModelContext()
    crit = CrossEntropy(**objective)
    reducer: GradientReducer
    if collectives.size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.eval()
        for _ in range(2):
            model(data(0, 1)[0].to(next(model.parameters()).dtype)).sum().backward()
        model.train()
        reducer = DDPReducer(model, context, optimizer.parameters, collectives)
    else:
        reducer = SliceReducer(context, 1, optimizer.parameters, collectives)
    return EagerStep(bind(model, context), crit, optimizer, rate, reducer, collectives, max_grad_norm=max_grad_norm)


def state(model: nn.Module) -> dict[str, npt.NDArray[Any]]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 100.0])
@pytest.mark.parametrize(("weights", "smoothing"), [(None, 0.0), (WEIGHTS, 0.1)])
@pytest.mark.parametrize("make", [classifier, without_batch_norm])
def test_twenty_steps_are_those_of_a_plain_torch_loop(
    make: Callable[[], nn.Module], weights: Tensor | None, smoothing: float, max_grad_norm: float | None
) -> None:
    model, plain = make(), make()
    step = build_step(model, max_grad_norm=max_grad_norm, class_weights=weights, label_smoothing=smoothing)
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, **ADAMW
    )
    for index in range(20):
        x, y = data(index)
        outcome = step([fake_batch(x, y)], index, wants_stop=False)
        loss = F.cross_entropy(plain(x), y, weights, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate(index)
        optimizer.step()
        assert bool(outcome.finite)
        assert outcome.learning_rate == rate(index)
        assert (outcome.totals[0] / outcome.totals[1]).item() == pytest.approx(loss.item(), rel=1e-12)
        assert float(outcome.grad_norm) == pytest.approx(norm.item(), rel=1e-10)
    # The bias before BatchNorm has a gradient of rounding noise, which AdamW scales up.
    assert_close(state(model), state(plain), 1e-12 if make is without_batch_norm else 1e-9)


@pytest.mark.parametrize("passes", [2, 3, 7])
def test_accumulation_is_the_single_pass(passes: int) -> None:
    one, several = without_batch_norm(), without_batch_norm()
    steps = [build_step(m, class_weights=WEIGHTS, label_smoothing=0.1) for m in (one, several)]
    for index in range(5):
        x, y = data(index, 25)
        parts = [fake_batch(x[a:b], y[a:b]) for a, b in split_evenly(0, 25, passes)]
        first = steps[0]([fake_batch(x, y)], index, wants_stop=False)
        second = steps[1](parts, index, wants_stop=False)
        torch.testing.assert_close(first.totals, second.totals, rtol=1e-12, atol=0)
        torch.testing.assert_close(first.grad_norm, second.grad_norm, rtol=1e-10, atol=0)
        assert first.rows == second.rows == 25
    assert_close(state(several), state(one), 1e-12)


def train_on_ranks(collectives: Collectives, passes: int, rows: int) -> tuple[dict[str, npt.NDArray[Any]], list[float]]:
    model = zero_grad_of_biases_before_batchnorm(sync_batch_norm(classifier(), collectives))
    step = build_step(model, collectives, class_weights=WEIGHTS, label_smoothing=0.1)
    losses = []
    for index in range(6):
        x, y = data(index, rows)
        parts = [
            fake_batch(x[a:b], y[a:b], rank=collectives.rank, size=collectives.size)
            for a, b in split_evenly(0, rows, passes)
        ]
        outcome = step(parts, index, wants_stop=collectives.rank == 1)
        assert outcome.totals[2] == (collectives.size > 1)
        assert outcome.rows == rows
        losses.append((outcome.totals[0] / outcome.totals[1]).item())
    return state(model), losses


@pytest.mark.parametrize(("world_size", "passes", "rows"), [(2, 1, 25), (3, 2, 4), (3, 1, 2)])
def test_ranks_share_a_step(world_size: int, passes: int, rows: int) -> None:
    """Rows per rank from 0 up; weighted rows, so a mean of means would be wrong."""
    ((alone, losses),) = on_ranks(1, train_on_ranks, passes, rows)
    for together, their_losses in on_ranks(world_size, train_on_ranks, passes, rows):
        assert_close(together, alone, 1e-11)
        assert their_losses == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_objective_is_cross_entropy_also_over_parts(weights: Tensor | None, smoothing: float) -> None:
    x, y = data(0, 31)
    model, objective = without_batch_norm(), CrossEntropy(weights, smoothing)
    expected = F.cross_entropy(model(x), y, weights, label_smoothing=smoothing)
    for pieces in (1, 2, 40):  # 40 pieces: some without rows
        parts = [objective(model(x[a:b]), y[a:b], (b - a,)) for a, b in split_evenly(0, 31, pieces)]
        total = torch.cat([p.loss for p in parts]).sum() / torch.cat([p.weight for p in parts]).sum()
        torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    y = data(0, 50)[1]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=y.numpy())
    np.testing.assert_allclose(balanced_weights(y, 3).numpy(), expected, rtol=1e-15)
    assert balanced_weights(y, 3)[y].mean().item() == pytest.approx(1.0)


def bits(step: EagerStep, model: nn.Module) -> list[bytes]:
    tensors = [*model.parameters(), *step.optimizer.state_dict().values()]
    return [t.detach().numpy().tobytes() for t in tensors]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("first", [0, 3])
def test_nothing_is_updated_where_the_loss_is_not_finite(poison: float, first: int) -> None:
    model = without_batch_norm()
    step = build_step(model)
    for index in range(first):
        step([fake_batch(*data(index))], index, wants_stop=False)
    before = [p.detach().clone() for p in model.parameters()]
    saved = bits(step, model)
    x, y = data(first)
    bad = x.clone()
    bad[5] = poison
    assert not step([fake_batch(bad, y)], first, wants_stop=False).finite
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert bits(step, model) == saved
    assert step([fake_batch(x, y)], first, wants_stop=False).finite
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_nothing_is_updated_where_only_the_gradient_is_not_finite() -> None:
    model = without_batch_norm()
    step = build_step(model)
    whole = step.objective

    def objective(logits: Tensor, targets: Tensor, slices: tuple[int, ...]) -> LossSum:
        loss, weight = whole(logits, targets, slices)
        first = next(model.parameters())
        return LossSum(loss + (first * 0).sqrt().sum(), weight)  # zero, with a slope of infinity times zero

    step([fake_batch(*data(0))], 0, wants_stop=False)
    saved = bits(step, model)
    step.objective = objective
    outcome = step([fake_batch(*data(1))], 1, wants_stop=False)
    assert outcome.totals.isfinite().all()
    assert not bool(outcome.finite)
    assert bits(step, model) == saved


class PoisonedFeed(FakeFeed):
    """Rank 1 meets a row that is not a number in its third step."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__(5)
        self.collectives = collectives

    def steps(self, position: Position) -> Any:  # noqa: ARG002
        for index in range(5):
            x, y = data(index, 10)
            if index == 2:
                x[8] = math.nan
            share = fake_batch(x, y, rank=self.collectives.rank, size=self.collectives.size)
            rows = share.rows + 100 * index
            yield [FakeBatch(share.inputs, share.targets, rows, 0, share.first_row, 10)], Position(0, 10 * index + 10)


def poisoned_run(collectives: Collectives, learning_rate: float) -> tuple[str, bool]:
    model = without_batch_norm()
    if learning_rate > 1:
        model.float()
    step = build_step(model, collectives, max_grad_norm=None)
    step.learning_rate = lambda _: learning_rate
    before: list[list[Tensor]] = []

    def watched(batches: Any, index: int, *, wants_stop: bool) -> StepResult:
        before.append([p.detach().clone() for p in model.parameters()])
        if learning_rate > 1:
            cast = [FakeBatch((b.inputs[0].float().nan_to_num(),), b.targets, b.rows, 0, 0, 10) for b in batches]
            return step(cast, index, wants_stop=wants_stop)
        return step(batches, index, wants_stop=wants_stop)

    loop = Loop(
        watched,
        PoisonedFeed(collectives),
        Progress(),
        Meter(),
        Intervals(total_steps=5, log_steps=1, save_steps=99, evaluate_steps=99, patience=None),
        collectives,
        evaluate=lambda: None,
        save=lambda _: None,
        track=lambda _: None,
        wants_stop=lambda: False,
    )
    with pytest.raises(TrainingFault) as fault:
        loop.run()
    untouched = all(torch.equal(p, q) for p, q in zip(model.parameters(), before[-1], strict=True))
    return str(fault.value), untouched


def test_a_bad_row_on_one_rank_stops_all_with_the_same_words() -> None:
    answers = on_ranks(2, poisoned_run, 1e-2)
    assert answers[0] == answers[1]
    message, untouched = answers[0]
    assert untouched
    assert message.startswith("step 3 (epoch 1): the loss is nan")
    assert "10 rows, data rows 201, 202, 203, 204, 205, 206, 207, 208, 209, 210." in message


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_learning_rate_that_overflows_stops_all(world_size: int) -> None:
    answers = on_ranks(world_size, poisoned_run, 1e38)
    assert len(set(answers)) == 1
    message, untouched = answers[0]
    assert untouched
    assert message.startswith("step 2 (epoch 1): the loss is")
    assert "Lower optim.lr" in message


def test_biases_and_normalisation_are_not_decayed() -> None:
    model = classifier()
    model.layers[7].weight.requires_grad_(False)
    optimizer = AdamW(model, weight_decay=0.1, undecayed=undecayed_parameters(model), **ADAMW)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(optimizer.parameters.zeros(), 0.5, torch.tensor(True))
    for name, p in model.named_parameters():
        decayed = name in ("layers.0.weight", "layers.4.weight")
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * 0.1 * decayed), rtol=1e-15, atol=0)


def test_moving_average_is_the_recursion_and_buffers_follow() -> None:
    model, decay = classifier(), 0.9
    step = build_step(model)
    assert isinstance(step.optimizer, AdamW)
    step.average = average = MovingAverage(classifier(), model, step.optimizer.parameters, decay)
    expected: dict[str, Tensor] = {}
    for index in range(6):
        step([fake_batch(*data(index))], index, wants_stop=False)
        for name, p in model.named_parameters():
            now = p.detach().clone()
            expected[name] = decay * expected[name] + (1 - decay) * now if index else now
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-14)
    for ours, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


class Grouped(nn.Module):
    """Declares a rate of its own for a layer, and no decay for a matrix."""

    lr_multipliers: ClassVar = {"first.weight": 0.1, "first.bias": 3.0}
    no_weight_decay = ("last.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def test_groups_of_a_family_are_those_of_torchs_adamw() -> None:
    with seeded("groups"):
        model, plain = Grouped(), Grouped()
    plain.load_state_dict(model.state_dict())
    optimizer = AdamW(
        model, weight_decay=0.1, undecayed=undecayed_parameters(model), lr_multipliers=lr_multipliers(model), **ADAMW
    )
    groups = [
        {"params": [plain.first.weight], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [plain.first.bias], "lr": 3e-2, "weight_decay": 0.0},
        {"params": [plain.last.weight, plain.last.bias], "lr": 1e-2, "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, **ADAMW)
    for index in range(5):
        x, y = data(index)
        flat = optimizer.parameters.zeros()
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), optimizer.parameters.parameters)
        torch._foreach_copy_(optimizer.parameters.views(flat), list(gradients))
        optimizer.step(flat, 1e-2, finite=True)
        theirs.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        theirs.step()
    assert_close(state(model), state(plain), 1e-12)


def test_a_multiplier_of_no_parameter_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grouped, "lr_multipliers", {"second.weight": 0.1})
    with pytest.raises(ValueError, match=r"Grouped\.lr_multipliers: 'second\.weight': 0\.1 fits no parameter"):
        lr_multipliers(Grouped())


def test_meter_weighs_steps_by_their_rows() -> None:
    meter = Meter()
    meter.add(3.0, 1.0)
    meter.add(1.0, 3.0)
    assert meter.take_loss() == 1.0
    meter.add(8.0, 4.0)
    assert meter.take_loss() == 2.0


def test_the_state_of_an_optimizer_must_be_whole() -> None:
    model = classifier()
    step = build_step(model)
    step([fake_batch(*data(0))], 0, wants_stop=False)
    state = {k: v for k, v in step.optimizer.state_dict().items() if not k.startswith("layers.4.weight/")}
    with pytest.raises(KeyError, match=r"layers\.4\.weight"):
        step.optimizer.load_state_dict(state)
