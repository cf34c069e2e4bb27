"""Every row is counted once, and the numbers are the same bits on every world size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from dist_train.determinism.arithmetic import Arithmetic
from dist_train.determinism.keyed_random import seeded
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import TrainingFault
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.training.evaluation import ROWS_OF_LENGTHS, by_length, evaluate, probabilities
from dist_train.training.metrics import classification_metrics
from tests.ranks import on_ranks
from tests.training.fakes import FakeRows

NAMES = ["high", "low", "medium"]
PASS = 8
ROW_COUNTS = [0, 1, 2, 7, 8, 9, 16, 17, 23, 24, 25, 40]


class Scorer:
    """Scores three classes."""

    class_names = NAMES
    arithmetic = Arithmetic()

    def probabilities(self, logits: Tensor) -> Tensor:
        return Arithmetic().probabilities(logits)

    def metrics(self, probabilities: Tensor, targets: Tensor) -> dict[str, Any]:
        return classification_metrics(probabilities.numpy(), targets.numpy(), NAMES)


SCORER = Scorer()


def rows(count: int) -> FakeRows:
    rng = np.random.default_rng(count)
    features = rng.normal(size=(count, 6)).astype(np.float32)
    return FakeRows(torch.from_numpy(features), torch.from_numpy(rng.integers(0, 3, count)))


def classifier() -> nn.Module:
    with seeded("test"):
        return FinancialClassifier(6, 8, 3)


def on_a_rank(collectives: Collectives) -> list[tuple[npt.NDArray[Any] | None, dict[str, Any] | None]]:
    model = classifier()
    answers = []
    for count in ROW_COUNTS:
        predicted = probabilities(model, rows(count), PASS, SCORER, collectives)
        assert (predicted is None) == (not collectives.is_main)
        metrics = evaluate(model, rows(count), SCORER, PASS, collectives)
        answers.append((None if predicted is None else predicted.numpy(), metrics))
        assert model.training
    return answers


def test_any_row_count_on_one_two_and_three_ranks() -> None:
    (alone,) = on_ranks(1, on_a_rank)
    model = classifier().eval()
    for count, (predicted, metrics) in zip(ROW_COUNTS, alone, strict=True):
        assert predicted is not None
        expected = model(rows(count).inputs).double().softmax(1).detach().numpy()
        assert predicted.shape == (count, 3)
        np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-6)
        if count:
            assert metrics == classification_metrics(predicted, rows(count).targets.numpy(), NAMES)
            assert metrics["rows"] == np.sum(metrics["confusion_matrix"]) == count
        else:
            assert metrics is None
    for world_size in (2, 3):
        for answers in on_ranks(world_size, on_a_rank):
            for (predicted, metrics), (theirs, their_metrics) in zip(answers, alone, strict=True):
                assert theirs is not None
                assert predicted is None or predicted.tobytes() == theirs.tobytes()
                assert metrics == their_metrics


class RowsOfLengths:
    """As texts are: a pass is as wide as the longest of them."""

    weights = None

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        self.features, self.targets = features, targets
        self.lengths = self.padded_lengths = torch.randperm(len(targets), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.targets)

    def slice(self, start: int, stop: int) -> tuple[Tensor, ...]:
        raise AssertionError(f"rows {start} to {stop} have many lengths")

    def inputs(self, index: Tensor) -> tuple[Tensor, ...]:
        assert len(index) <= ROWS_OF_LENGTHS["cpu"]
        if len(index):
            assert self.lengths[index].max() - self.lengths[index].min() < ROWS_OF_LENGTHS["cpu"]
        return (self.features[index],)


def rows_of_lengths_on_a_rank(collectives: Collectives) -> tuple[list[float], bool, float]:
    """Rows that this rank was shown, by their first number; whether its probabilities are right; the loss."""
    given, model = rows(100), Watched()
    shown = RowsOfLengths(given.inputs, given.targets)
    predicted = probabilities(model, shown, 2048, SCORER, collectives)
    metrics = evaluate(model, shown, SCORER, 2048, collectives)
    assert metrics is not None
    right = predicted is None or torch.equal(predicted, given.inputs[:, :3].double().softmax(1))
    return model.shown[: len(model.shown) // 2], right, metrics["loss"]


def test_rows_of_lengths_are_shared_by_the_ranks_and_keep_their_order() -> None:
    (alone,) = on_ranks(1, rows_of_lengths_on_a_rank)
    first, second = on_ranks(2, rows_of_lengths_on_a_rank)
    for _, right, loss in (alone, first, second):
        assert right
        assert loss == alone[2]
    assert sorted(first[0] + second[0]) == sorted(alone[0])
    assert sorted((len(first[0]), len(second[0]))) == [36, 64]


def test_each_rank_has_short_and_long_rows() -> None:
    lengths = torch.arange(1000)
    order = by_length(lengths, 32, 2)
    of_ranks = order[:512], order[512:]
    assert sorted(order.tolist()) == lengths.tolist()
    assert abs(of_ranks[0].double().mean() - of_ranks[1].double().mean()) < 32


class Watched(nn.Module):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.shown += x[:, 0].tolist()
        return x[:, :3]


def test_every_row_is_shown_once_in_order() -> None:
    model, table = Watched(), rows(21)
    probabilities(model, table, PASS, SCORER, Collectives(World()))
    assert model.shown == table.inputs[:, 0].tolist()


def broken(collectives: Collectives) -> str:
    model = classifier()
    with torch.no_grad():
        model.get_parameter("layers.7.weight").fill_(math.inf)
    with pytest.raises(TrainingFault) as fault:
        evaluate(model, rows(20), SCORER, PASS, collectives)
    return str(fault.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_that_overflow_are_a_fault_on_every_rank(world_size: int) -> None:
    messages = on_ranks(world_size, broken)
    assert len(set(messages)) == 1
    assert messages[0].startswith("the model's probabilities are not finite for 20 of 20 rows")
