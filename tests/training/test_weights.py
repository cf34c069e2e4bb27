"""A row of weight 2 is two rows: in the loss, in its gradient, and in every metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.schema import EvaluationConfig
from dist_train.determinism.keyed_random import seeded
from dist_train.determinism.position import split_evenly
from dist_train.errors import UserError
from dist_train.training.loss import CrossEntropy, Objective, RegisteredLoss, balanced_weights
from dist_train.training.metrics import (
    classification_metrics,
    register_metric,
    registered_metrics,
    unweighted_metrics,
)
from tests.training.fakes import FakeBatch
from tests.training.test_metrics import names, scored
from tests.training.test_step import build_step, without_batch_norm

CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def integers(rows: int, seed: int = 3) -> Tensor:
    """Weights from 0 to 4, zeros among them."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 5, rows)).double()


def close(ours: Any, theirs: Any, path: str = "") -> None:
    if isinstance(theirs, dict):
        for name, value in theirs.items():
            if name != "rows":  # counts rows, of which there are fewer
                close(ours[name], value, f"{path}.{name}")
    elif theirs is None:
        assert ours is None, path
    else:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, err_msg=path)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_the_table_with_repeated_rows(classes: int, seed: int) -> None:
    p, y = scored(400, classes, seed=seed)
    weights = integers(400, seed).numpy()
    repeats = weights.astype(int)
    weighted = classification_metrics(p, y, names(classes), weights)
    close(weighted, classification_metrics(p.repeat(repeats, 0), y.repeat(repeats), names(classes)))
    assert weighted["rows"] == 400
    assert weighted["weight"] == repeats.sum()
    assert sum(scores["weight"] for scores in weighted["per_class"].values()) == repeats.sum()


def test_weights_are_shares_not_counts() -> None:
    p, y = scored(300, 3)
    weights = np.random.default_rng(0).random(300)
    small, large = (classification_metrics(p, y, names(3), weights * factor) for factor in (1, 1e6))
    for name in ("loss", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "brier", "ece"):
        assert small[name] == pytest.approx(large[name], rel=1e-12), name


def test_a_class_whose_rows_count_nothing_does_not_occur() -> None:
    p, y = scored(200, 3)
    weights = np.where(y == 1, 0.0, 2.0)
    ours = classification_metrics(p, y, names(3), weights)
    left = classification_metrics(p[y != 1], y[y != 1], names(3))
    assert ours["auroc"] is None
    assert ours["balanced_accuracy"] == pytest.approx(left["balanced_accuracy"], abs=1e-12)
    assert ours["per_class"]["class 1"]["weight"] == 0


def row_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "plain": CrossEntropy,
    "classes weighted": lambda: CrossEntropy(CLASS_WEIGHTS),
    "smoothed": lambda: CrossEntropy(CLASS_WEIGHTS, 0.2),
    "registered": lambda: RegisteredLoss("own", row_loss, CLASS_WEIGHTS),
}


@pytest.mark.parametrize("members", [0, 1, 3])
@pytest.mark.parametrize("pieces", [1, 40])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_that_of_repeated_rows(objective: str, pieces: int, members: int) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(31, members, 3) if members else (31, 3)))
    y, weights, crit = torch.from_numpy(rng.integers(0, 3, 31)), integers(31), OBJECTIVES[objective]()
    repeats = weights.long()
    slices = tuple(b - a for a, b in split_evenly(0, 31, pieces))  # of 40 some have no rows
    ours = crit(logits, y, slices, weights)
    many = crit(logits.repeat_interleave(repeats, 0), y.repeat_interleave(repeats), (int(repeats.sum()),))
    torch.testing.assert_close(ours.loss.sum(), many.loss.sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.weight.sum(), many.weight.sum().double(), rtol=1e-13, atol=0)
    assert ours.loss.shape == ours.weight.shape == (pieces,)


def weighted_batch(x: Tensor, y: Tensor, weights: Tensor | None) -> FakeBatch:
    return FakeBatch((x,), y, torch.arange(len(y)), global_rows=len(y), weights=weights)


def model_of(dtype: torch.dtype) -> nn.Module:
    return without_batch_norm().to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_gradient_of_a_full_batch_is_that_of_repeated_rows(dtype: torch.dtype, tolerance: float) -> None:
    with seeded("weights"):
        x, y = torch.randn(500, 6).to(dtype), torch.randint(0, 3, (500,))
    weights = integers(500)
    repeats = weights.long()
    gradients = []
    for batch in (
        weighted_batch(x, y, weights),
        weighted_batch(x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats), None),
    ):
        step = build_step(model_of(dtype), max_grad_norm=None, class_weights=CLASS_WEIGHTS.to(dtype))
        taken: list[Tensor] = []
        step.optimizer.step = lambda gradient, *_, taken=taken: taken.append(gradient.clone())  # type: ignore[method-assign]
        step([batch], 0, wants_stop=False)
        gradients += taken
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=tolerance)


def test_a_batch_that_counts_nothing_changes_no_weight_to_nan() -> None:
    model = without_batch_norm()
    step = build_step(model)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    outcome = step([weighted_batch(x, y, torch.zeros(8, dtype=torch.float64))], 0, wants_stop=False)
    assert bool(outcome.finite)
    assert float(outcome.grad_norm) == 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_balanced_class_weights_count_weights() -> None:
    y, weights = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1.0, 2, 3, 0, 1, 2], dtype=torch.float64)
    expected = balanced_weights(y.repeat_interleave(weights.long()), 3)
    torch.testing.assert_close(balanced_weights(y, 3, weights), expected, rtol=1e-15, atol=0)


def test_a_registered_metric_gets_weights_where_it_takes_them() -> None:
    p, y = scored(50, 3)
    weights = integers(50).numpy()
    seen: list[Any] = []

    @register_metric("mine")
    def mine(probabilities: Any, _targets: Any, _class_names: Any, weights: Any = None) -> float:
        seen.append(weights)
        return float(np.average(probabilities[:, 0], weights=weights))

    register_metric("plain")(lambda _probabilities, targets, _class_names: len(targets))
    found = registered_metrics(["mine", "plain"], p, y, names(3), weights)
    assert found == {"mine": np.average(p[:, 0], weights=weights), "plain": 50}
    assert not seen[0].flags.writeable
    assert registered_metrics(["mine"], p, y, names(3)) == {"mine": pytest.approx(p[:, 0].mean())}
    assert unweighted_metrics(["mine", "plain"]) == ["plain"]
    with pytest.raises(UserError, match="there is no metric 'gone'"):
        registered_metrics(EvaluationConfig(metrics=["gone"]).metrics, p, y, names(3), weights)
