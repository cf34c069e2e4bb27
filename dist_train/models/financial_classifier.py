"""The default model."""

from __future__ import annotations

from torch import Tensor, nn


class FinancialClassifier(nn.Module):
    """Tabular MLP: two hidden layers, BatchNorm after the first.

    Shapes: features (rows, input_dim) -> logits (rows, num_classes). The second hidden layer has `hidden_dim // 2`
    units; `dropout` holds the probabilities after the first and the second hidden layer.

        >>> import torch
        >>> FinancialClassifier(50, 256, 3)(torch.zeros(4, 50)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self, input_dim: int, hidden_dim: int, num_classes: int, dropout: tuple[float, float] = (0.3, 0.2)
    ) -> None:
        super().__init__()
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

    def forward(self, features: Tensor) -> Tensor:
        """Logits of the rows."""
        logits: Tensor = self.layers(features)
        return logits
