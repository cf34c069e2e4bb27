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
from dist_train.models.embeddings import SPECIAL_SLOTS, Embedded
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.models.registry import MODELS, build_model, check_model_name


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
    model = build_model(ModelConfig(hidden_dim=8), input_dim=5, embedded_sizes=[], num_classes=3, seed=0)
    trained = convert_dropout(
        zero_grad_of_biases_before_batchnorm(sync_batch_norm(model, Collectives(World()))), ModelContext()
    )
    assert list(trained.state_dict()) == list(Plain(5, 8, 3).state_dict())


def test_default_dropout_and_parameter_count() -> None:
    model = FinancialClassifier(50, 256, 3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.2]
    expected = (50 * 256 + 256) + 2 * 256 + (256 * 128 + 128) + (128 * 3 + 3)
    assert sum(p.numel() for p in model.parameters()) == expected == 46851


def weights_of(seed: int, embedded_sizes: list[int]) -> Tensor:
    config = ModelConfig(hidden_dim=8, embedding_dim=3 if embedded_sizes else None)
    model = build_model(config, input_dim=5, embedded_sizes=embedded_sizes, num_classes=3, seed=seed)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("embedded_sizes", [[], [4, 6]])
def test_initial_weights_are_a_function_of_the_seed(embedded_sizes: list[int]) -> None:
    first = weights_of(1, embedded_sizes)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(weights_of(1, embedded_sizes), first)
    assert torch.equal(torch.get_rng_state(), before), "building a model drew from torch's global generator"
    assert not torch.equal(weights_of(2, embedded_sizes), first)


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"model.name: there is no model 'resnet'; there is financial_classifier"):
        check_model_name(ModelConfig(name="resnet"))


def test_embeddings_are_joined_to_the_features_in_order() -> None:
    model = Embedded(2, [5, 4], 3, lambda width: nn.Linear(width, 2))
    features, slots = torch.randn(6, 2), torch.tensor([[0, 1], [1, 0], [2, 2], [3, 3], [4, 2], [2, 3]])
    first, second = (e.get_parameter("weight") for e in model.embeddings)
    joined = torch.cat([features, first[slots[:, 0]], second[slots[:, 1]]], 1)
    torch.testing.assert_close(model(features, slots), model.classifier(joined), rtol=0, atol=0)
    for table in (first, second):
        assert table[:SPECIAL_SLOTS].eq(0).all()
        assert table[SPECIAL_SLOTS:].ne(0).all()
    assert model(features[:0], slots[:0]).shape == (0, 2)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("embedded_sizes", [[], [4, 6]])
def test_every_model_keeps_the_contract_of_a_model(name: str, embedded_sizes: list[int]) -> None:
    """Rows in, logits out; every weight gets a gradient; rows do not see each other in evaluation; no rows is fine."""
    config = ModelConfig(name=name, hidden_dim=8, embedding_dim=3 if embedded_sizes else None)
    model = build_model(config, input_dim=5, embedded_sizes=embedded_sizes, num_classes=3, seed=0)
    inputs: list[Tensor] = [torch.randn(40, 5)]
    if embedded_sizes:
        inputs.append(torch.stack([torch.arange(40) % size for size in embedded_sizes], 1))
    logits = model(*inputs)
    assert logits.shape == (40, 3)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(model(*inputs)[3:5], model(*(x[3:5] for x in inputs)))
    assert model(*(x[:0] for x in inputs)).shape == (0, 3)


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
