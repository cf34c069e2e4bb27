"""The default model and its registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_train.config.schema import ModelConfig
from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.batch_norm import sync_batch_norm, zero_grad_of_biases_before_batchnorm
from dist_train.determinism.dropout import convert_dropout
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.models.registry import build_model
from tests.models.specs import make_spec


class Plain(nn.Module):
    """The model of the README, written out in torch.nn alone."""

    def __init__(self, input_dim: int, hidden_dim: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden_dim, hidden_dim // 2),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(hidden_dim // 2, num_classes),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)  # type: ignore[no-any-return]


def test_weights_load_strict_into_plain_torch_and_give_the_same_logits() -> None:
    ours, plain = FinancialClassifier(50, 256, 3), Plain(50, 256, 3)
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(7, 50)
    torch.testing.assert_close(plain.eval()(x), ours.eval()(x), rtol=0, atol=0)


def test_training_leaves_the_names_of_the_weights_alone() -> None:
    model = build_model(make_spec(1, [4], num_flags=0), ModelConfig(hidden_dim=8), seed=0)
    trained = convert_dropout(
        zero_grad_of_biases_before_batchnorm(sync_batch_norm(model, Collectives(World()))), ModelContext()
    )
    assert list(trained.state_dict()) == list(Plain(5, 8, 3).state_dict())


def test_default_dropout_and_parameter_count() -> None:
    model = FinancialClassifier(50, 256, 3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.2]
    expected = (50 * 256 + 256) + 2 * 256 + (256 * 128 + 128) + (128 * 3 + 3)
    assert sum(p.numel() for p in model.parameters()) == expected == 46851


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"model.name: there is no model 'unknown'; there is financial_classifier"):
        build_model(make_spec(), ModelConfig(name="unknown"), seed=0)


def test_the_bias_before_batch_norm_stays_still_in_training_only() -> None:
    torch.manual_seed(0)
    model = zero_grad_of_biases_before_batchnorm(FinancialClassifier(5, 8, 3, (0.0, 0.0)).double())
    plain = Plain(5, 8, 3).double()
    for dropout in (plain.layers[3], plain.layers[6]):
        dropout.p = 0.0  # type: ignore[assignment]
    plain.load_state_dict(model.state_dict())
    x = torch.randn(9, 5, dtype=torch.float64)
    for training in (True, False):
        for one in (model.train(training), plain.train(training)):
            one.zero_grad()
            one(x).square().sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12, msg=name)
        bias = model.get_parameter("layers.0.bias").grad
        assert bias is not None
        assert bool(bias.eq(0).all()) == training
