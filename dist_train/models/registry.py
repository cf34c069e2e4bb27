"""Models by name. A new family is a file beside this one and a line in MODELS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from dist_train.config.rules import dropout_pair
from dist_train.config.schema import ModelConfig
from dist_train.determinism.keyed_random import seeded
from dist_train.errors import UserError
from dist_train.models.embeddings import Embedded
from dist_train.models.financial_classifier import FinancialClassifier

MODELS: dict[str, Callable[[ModelConfig, int, int], nn.Module]] = {
    "financial_classifier": lambda m, input_dim, num_classes: FinancialClassifier(
        input_dim, m.hidden_dim, num_classes, dropout_pair(m)
    ),
}


def check_model_name(model: ModelConfig) -> None:
    """UserError when the registry does not know the name."""
    if model.name not in MODELS:
        raise UserError(f"model.name: there is no model {model.name!r}; there is {', '.join(MODELS)}")


def build_model(
    model: ModelConfig, *, input_dim: int, embedded_sizes: Sequence[int], num_classes: int, seed: int
) -> nn.Module:
    """The model with initial weights that are a function of the seed, float32 on the CPU."""
    check_model_name(model)

    def make_classifier(width: int) -> nn.Module:
        return MODELS[model.name](model, width, num_classes)

    with seeded("initial weights", seed):
        if embedded_sizes and model.embedding_dim:
            return Embedded(input_dim, embedded_sizes, model.embedding_dim, make_classifier)
        return make_classifier(input_dim)
