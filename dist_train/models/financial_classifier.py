"""The default model."""

from __future__ import annotations

from torch import Tensor, nn

from dist_train.config.rules import dropout_pair
from dist_train.config.schema import ModelConfig
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.models.embeddings import Embedded, TabularInputs
from dist_train.models.registry import register_model


class FinancialClassifier(nn.Module):
    """Tabular MLP: two hidden layers, BatchNorm after the first.

    Shapes: features (rows, input_dim) -> logits (rows, num_classes). The second hidden layer has `hidden_dim // 2`
    units; `dropout` holds the probabilities after the first and the second hidden layer. `inputs` makes the features
    out of the model's arguments; without it the features are the argument.

        >>> import torch
        >>> FinancialClassifier(50, 256, 3)(torch.zeros(4, 50)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        num_classes: int,
        dropout: tuple[float, float] = (0.3, 0.2),
        inputs: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.inputs = inputs or nn.Identity()
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout[0]),
            nn.Linear(hidden_dim, hidden_dim // 2),
            nn.ReLU(),
            nn.Dropout(dropout[1]),
            nn.Linear(hidden_dim // 2, num_classes),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of the rows."""
        logits: Tensor = self.layers(self.inputs(*inputs))
        return logits


@register_model("financial_classifier")
def build(spec: FeatureSpec, config: ModelConfig) -> nn.Module:
    """FinancialClassifier of one-hot categories, or of learned embeddings where `embedding_dim` is set."""

    def classifier(width: int, inputs: nn.Module | None = None) -> nn.Module:
        return FinancialClassifier(width, config.hidden_dim, spec.num_classes, dropout_pair(config), inputs)

    if config.embedding_dim and spec.num_categorical:
        return Embedded(spec, config.embedding_dim, classifier)
    inputs = TabularInputs(spec)
    return classifier(inputs.width, inputs)
