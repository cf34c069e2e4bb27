"""From a batch's numbers, flags and category codes to the dense rows that a network takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_train.data.spec import FIRST_CATEGORY, FeatureSpec


class OneHot(nn.Module):
    """Category codes as one-hot rows, the columns side by side.

    Shapes: codes (rows, num_categorical) integer -> (rows, width) in the dtype of the module, where width is the sum of
    `spec.category_sizes`. A code that did not occur in training gives zeros: it adds nothing, rather than the noise of
    weights that were never trained.

    Its buffers are not in the state_dict: the spec determines them.

        >>> from dist_train.data.spec import CategoricalColumn, FeatureSpec
        >>> city = CategoricalColumn(name="city", categories=("Oslo",), seen_in_training=(True, False, True))
        >>> spec = FeatureSpec(numeric=(), categorical=(city,), class_names=("high", "low"))
        >>> OneHot(spec)(torch.tensor([[0], [1], [2]])).tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """

    row_wise = True
    first: Tensor
    seen: Tensor

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        sizes = torch.tensor(spec.category_sizes, dtype=torch.int64)
        self.width = int(sizes.sum())
        seen = [flag for column in spec.categorical for flag in column.seen_in_training]
        self.register_buffer("first", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("seen", torch.tensor(seen, dtype=torch.get_default_dtype()), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """One-hot rows."""
        return self.write(codes, self.seen.new_zeros((len(codes), self.width)))

    def write(self, codes: Tensor, zeros: Tensor) -> Tensor:
        """One-hot rows into `zeros`, (rows, width) of the module's dtype."""
        index = codes + self.first
        return zeros.scatter_(1, index, self.seen[index])


class TabularInputs(nn.Module):
    """Numbers, missing flags and one-hot categories side by side.

    Shapes: numeric (rows, num_numeric) floating point, flags (rows, num_flags) uint8, codes (rows, num_categorical)
    integer -> (rows, width) in the dtype of `numeric`. A table of numbers without missing cells passes as it is.
    """

    row_wise = True

    def __init__(self, spec: FeatureSpec, *, one_hot: bool = True) -> None:
        super().__init__()
        self.one_hot = OneHot(spec) if one_hot and spec.num_categorical else None
        self.num_numeric = spec.num_numeric
        self.num_dense = spec.num_numeric + spec.num_flags
        self.width = self.num_dense + (self.one_hot.width if self.one_hot else 0)

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Dense rows."""
        if self.width == self.num_numeric:
            return numeric
        dense = numeric.new_zeros((len(numeric), self.width))
        dense[:, : self.num_numeric] = numeric
        dense[:, self.num_numeric : self.num_dense] = flags
        if self.one_hot is not None:
            self.one_hot.write(codes, dense[:, self.num_dense :])
        return dense


class Embedded(nn.Module):
    """A learned embedding of each categorical column, beside numbers and missing flags, in front of a dense network.

    Shapes: numeric (rows, num_numeric), flags (rows, num_flags), codes (rows, num_categorical) -> what the classifier
    returns. `make_classifier` is called with the joint width. The embeddings of missing and unknown categories start at
    zero and stay there unless such cells occur in training.
    """

    def __init__(self, spec: FeatureSpec, embedding_dim: int, make_classifier: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.inputs = TabularInputs(spec, one_hot=False)
        self.embeddings = nn.ModuleList(nn.Embedding(size, embedding_dim) for size in spec.category_sizes)
        for embedding in self.embeddings:
            with torch.no_grad():
                embedding.get_parameter("weight")[:FIRST_CATEGORY] = 0
        self.classifier = make_classifier(self.inputs.width + spec.num_categorical * embedding_dim)

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Logits of the rows."""
        index = codes.long()
        columns = [embedding(index[:, i]) for i, embedding in enumerate(self.embeddings)]
        logits: Tensor = self.classifier(torch.cat([self.inputs(numeric, flags, codes), *columns], 1))
        return logits
