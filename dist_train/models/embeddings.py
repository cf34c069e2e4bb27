"""From a batch's numbers, flags and category codes to the dense rows that a network takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dist_train.config.families import FeatureKeys
from dist_train.data.encoding.spec import FIRST_CATEGORY, CategoricalColumn, FeatureSpec
from dist_train.errors import UserError
from dist_train.models.numeric_embeddings import NumericEmbeddings


class OneHot(nn.Module):
    """Category codes as one-hot rows, the columns side by side.

    Shapes: codes (rows, num_categorical) integer -> (rows, width) in the dtype of the module, where width is the sum of
    `spec.category_sizes`. A code that did not occur in training gives zeros: it adds nothing, rather than the noise of
    weights that were never trained.

    Its buffers are not in the state_dict: the spec determines them.

        >>> from dist_train.data.encoding.spec import CategoricalColumn, FeatureSpec
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
        self.output_columns = [column.name for column in spec.categorical for _ in range(column.size)]
        seen = [flag for column in spec.categorical for flag in column.seen_in_training]
        self.register_buffer("first", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("seen", torch.tensor(seen, dtype=torch.get_default_dtype()), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """One-hot rows."""
        return self.write(codes, self.seen.new_zeros((codes.shape[0], self.width)))

    def write(self, codes: Tensor, zeros: Tensor) -> Tensor:
        """One-hot rows into `zeros`, (rows, width) of the module's dtype."""
        index = codes + self.first
        return zeros.scatter_(1, index, self.seen[index])


class TabularInputs(nn.Module):
    """Numbers, missing flags and one-hot categories side by side.

    Shapes: numeric (rows, num_numeric) floating point, flags (rows, num_flags) uint8, codes (rows, num_categorical)
    integer -> (rows, width) in the dtype of `numeric`. A table of numbers without missing cells passes as it is.
    `output_columns` are the columns of the table that the outputs are of, (width,): reasons are found by them.
    """

    row_wise = True

    def __init__(self, spec: FeatureSpec, *, one_hot: bool = True) -> None:
        super().__init__()
        self.one_hot = OneHot(spec) if one_hot and spec.num_categorical else None
        self.num_numeric = spec.num_numeric
        self.num_dense = spec.num_numeric + spec.num_flags
        self.width = self.num_dense + (self.one_hot.width if self.one_hot else 0)
        numbers, missing, _ = spec.columns_of_inputs
        self.output_columns = [*numbers, *missing, *(self.one_hot.output_columns if self.one_hot else ())]

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Dense rows."""
        if self.width == self.num_numeric:
            return numeric
        dense = numeric.new_zeros((numeric.shape[0], self.width))
        dense[:, : self.num_numeric] = numeric
        dense[:, self.num_numeric : self.num_dense] = flags
        if self.one_hot is not None:
            self.one_hot.write(codes, dense[:, self.num_dense :])
        return dense


class TableFeatures(nn.Module):
    """The columns of a table as dense rows: embedded numbers, missing flags, one-hot and embedded categories.

    Shapes: numeric (rows, num_numeric), flags (rows, num_flags), codes (rows, num_categorical) -> (rows, width) of the
    type of `numeric`. `widths` are the numbers of values that stand for each column and flag, in their order. Which
    columns are one-hot follows from `keys.one_hot_categories` and `keys.category_widths`. The embeddings of missing and
    unknown categories start at zero and stay there unless such cells occur in training.

    Raises:
        UserError: `keys.category_widths` names a column that is not categorical.
    """

    row_wise = True

    def __init__(self, spec: FeatureSpec, keys: FeatureKeys) -> None:
        super().__init__()
        embedded = embedding_widths(spec, keys)
        self.numbers = NumericEmbeddings(spec, keys)
        self.one_hot_columns = [i for i in range(spec.num_categorical) if i not in embedded]
        few = tuple(spec.categorical[i] for i in self.one_hot_columns)
        self.one_hot = OneHot(replace(spec, categorical=few)) if few else None
        self.embedded_columns = list(embedded)
        self.embeddings = nn.ModuleList(_embedding(spec.categorical[i], width) for i, width in embedded.items())
        counted = keys.category_frequencies and bool(embedded)
        self.frequencies = Frequencies([spec.categorical[i] for i in embedded]) if counted else None
        self.widths = [
            *self.numbers.widths,
            *[1] * spec.num_flags,
            *(column.size for column in few),
            *embedded.values(),
            *[1] * (len(embedded) if counted else 0),
        ]
        self.width = sum(self.widths)

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Dense rows."""
        parts = [self.numbers(numeric), flags.to(numeric.dtype)]
        if self.one_hot is not None:
            parts.append(self.one_hot(codes[:, self.one_hot_columns]))
        for column, embedding in zip(self.embedded_columns, self.embeddings, strict=True):
            parts.append(embedding(codes[:, column].long()))
        if self.frequencies is not None:
            parts.append(self.frequencies(codes[:, self.embedded_columns]))
        return torch.cat([part for part in parts if part.shape[1]], 1)


def embedding_widths(spec: FeatureSpec, keys: FeatureKeys) -> dict[int, int]:
    """Widths of the categorical columns that are embedded, by their places in `spec.categorical`; others are one-hot.

    The rule for columns without a width of their own is fastai's, with an upper limit of 64.

    Raises:
        UserError: `keys.category_widths` names a column that is not categorical.
    """
    names = [column.name for column in spec.categorical]
    strangers = [name for name in keys.category_widths if name not in names]
    if strangers:
        raise UserError(
            f"category_widths: there is no categorical column {strangers[0]!r}; there is {', '.join(names) or 'none'}"
        )
    widths: dict[int, int] = {}
    for index, (name, size) in enumerate(zip(names, spec.category_sizes, strict=True)):
        if name in keys.category_widths or size > keys.one_hot_categories:
            widths[index] = keys.category_widths.get(name, min(64, round(1.6 * size**0.56)))
    return widths


class Frequencies(nn.Module):
    """How frequent a category was in the training rows: log2((count + 1) / (mean count + 1)) / 4 of its code.

    Shapes: codes (rows, columns) integer -> (rows, columns) in the dtype of the module. A spec without counts gives
    zeros. Its buffer is not in the state_dict: the spec determines it.
    """

    row_wise = True
    table: Tensor
    first: Tensor

    def __init__(self, columns: Sequence[CategoricalColumn]) -> None:
        super().__init__()
        sizes = torch.tensor([column.size for column in columns])
        tables = [torch.tensor(column.counts or [0] * column.size, dtype=torch.float64) for column in columns]
        logs = [((counts + 1) / (counts.mean() + 1)).log2() / 4 for counts in tables]
        self.output_columns = [column.name for column in columns]
        self.register_buffer("table", torch.cat(logs).to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("first", sizes.cumsum(0) - sizes, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Numbers of the codes."""
        return self.table[codes + self.first]


def _embedding(column: CategoricalColumn, width: int) -> nn.Embedding:
    embedding = nn.Embedding(column.size, width)
    embedding.output_columns = [column.name] * width  # type: ignore[assignment]
    with torch.no_grad():
        embedding.weight[:FIRST_CATEGORY] = 0
        embedding.weight[[code for code, seen in enumerate(column.seen_in_training) if not seen]] = 0
    return embedding


class Embedded(nn.Module):
    """A learned embedding of each categorical column, beside numbers and missing flags, in front of a dense network.

    Shapes: numeric (rows, num_numeric), flags (rows, num_flags), codes (rows, num_categorical) -> what the classifier
    returns. `make_classifier` is called with the joint width. The embeddings of missing and unknown categories start at
    zero and stay there unless such cells occur in training.
    """

    def __init__(self, spec: FeatureSpec, embedding_dim: int, make_classifier: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.inputs = TabularInputs(spec, one_hot=False)
        self.embeddings = nn.ModuleList(_embedding(column, embedding_dim) for column in spec.categorical)
        self.classifier = make_classifier(self.inputs.width + spec.num_categorical * embedding_dim)

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Logits of the rows."""
        index = codes.long()
        columns = [embedding(index[:, i]) for i, embedding in enumerate(self.embeddings)]
        logits: Tensor = self.classifier(torch.cat([self.inputs(numeric, flags, codes), *columns], 1))
        return logits
