"""Learned embeddings of categories in front of any classifier of dense features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# The encoder's slots for a missing cell and an unknown category.
SPECIAL_SLOTS = 2


class Embedded(nn.Module):
    """Embeds each categorical column and hands dense features and embeddings, side by side, to a classifier.

    Shapes: features (rows, dense_dim), slots (rows, len(sizes)) int64 -> what the classifier returns. `make_classifier`
    is called with the joint width. The two special slots start at zero and stay there unless they occur in training.
    """

    def __init__(
        self, dense_dim: int, sizes: Sequence[int], embedding_dim: int, make_classifier: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, embedding_dim) for size in sizes)
        for embedding in self.embeddings:
            with torch.no_grad():
                embedding.get_parameter("weight")[:SPECIAL_SLOTS] = 0
        self.classifier = make_classifier(dense_dim + len(sizes) * embedding_dim)

    def forward(self, features: Tensor, slots: Tensor) -> Tensor:
        """Logits of the rows."""
        columns = [embedding(slots[:, i]) for i, embedding in enumerate(self.embeddings)]
        logits: Tensor = self.classifier(torch.cat([features, *columns], 1))
        return logits
