"""Fitted preprocessing: raw columns -> the numbers that the classifier sees. Part of the model that is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.data.table import as_text, numbers, require_columns

MISSING, UNKNOWN, FIRST_CATEGORY = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class EncoderDescription:
    """All of an encoder that is not a tensor; plain JSON types."""

    numeric: list[str]
    categories: dict[str, list[str]]
    """Vocabulary of each categorical column. Slot 0 is a missing cell, slot 1 an unknown category, then these."""
    class_names: list[str]
    one_hot: bool
    """Whether categories become one-hot features; else their slots are handed on to learned embeddings."""


class Encoder(nn.Module):
    """Robust scaling of numbers, vocabularies for categories.

    Numbers: missing cells get the training median, and a flag of their own in columns that had missing cells in
    training. Scaling is by median and interquartile range, then smoothly clipped to (-3, 3), so that a heavy tail
    neither stretches the scale nor dominates a batch ("robust scaling and smooth clipping", Holzmüller, Grinsztajn
    and Steinwart 2024, "Better by default").

    Categories: a slot that never occurred in training encodes to zeros: it adds nothing, rather than untrained noise.
    """

    median: Tensor
    scale: Tensor
    flagged: Tensor
    seen: Tensor

    def __init__(self, description: EncoderDescription) -> None:
        super().__init__()
        self.description = description
        num_numeric = len(description.numeric)
        self.register_buffer("median", torch.zeros(num_numeric, dtype=torch.float64))
        self.register_buffer("scale", torch.zeros(num_numeric, dtype=torch.float64))
        self.register_buffer("flagged", torch.zeros(num_numeric, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros(sum(self.category_sizes), dtype=torch.bool))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the model's outputs."""
        return self.description.class_names

    @property
    def category_sizes(self) -> list[int]:
        """Slots of each categorical column, the two special ones included."""
        return [FIRST_CATEGORY + len(names) for names in self.description.categories.values()]

    @property
    def embedded_sizes(self) -> list[int]:
        """Slots of each column that the model has to embed; empty when categories are one-hot."""
        return [] if self.description.one_hot else self.category_sizes

    @property
    def input_dim(self) -> int:
        """Width of the dense features."""
        dense = len(self.description.numeric) + int(self.flagged.sum())
        return dense + (sum(self.category_sizes) if self.description.one_hot else 0)

    def tabulate(self, frame: pl.DataFrame, source: str) -> tuple[Tensor, Tensor]:
        """Columns by name -> numbers (rows, numeric) float64 with NaN where missing, slots (rows, categorical) int64.

        Other columns are ignored, in whichever order they come. UserError names a missing column or a bad cell.
        """
        names = [*self.description.numeric, *self.description.categories]
        require_columns(frame, names, source, "the model was trained on it")
        numeric = [numbers(frame[name], source) for name in self.description.numeric]
        slots = [_slots(frame[name], words, source) for name, words in self.description.categories.items()]
        return _columns(numeric, frame.height, torch.float64), _columns(slots, frame.height, torch.int64)

    def forward(self, numeric: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Raw numbers and slots -> float32 features (rows, input_dim), slots to embed (rows, embedded columns)."""
        missing = numeric.isnan()
        centred = torch.where(missing, 0.0, (numeric - self.median) * self.scale)
        parts = [centred / torch.sqrt(1 + (centred / 3) ** 2), missing[:, self.flagged]]
        if self.description.one_hot:
            hot = [F.one_hot(slots[:, i], size) for i, size in enumerate(self.category_sizes)]
            parts.append(torch.cat(hot, 1) * self.seen if hot else slots)
        features = torch.cat([part.float() for part in parts], 1)
        return features, slots[:, :0] if self.description.one_hot else slots

    def describe(self) -> dict[str, Any]:
        """The description as JSON types; `from_description` reads it."""
        return asdict(self.description)

    @staticmethod
    def from_description(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoder:
        """An encoder as it was saved."""
        encoder = Encoder(EncoderDescription(**description))
        encoder.load_state_dict(dict(tensors))
        return encoder


def _slots(column: pl.Series, words: Sequence[str], source: str) -> Tensor:
    text = as_text(column, source)
    slots = text.replace_strict(
        {word: FIRST_CATEGORY + index for index, word in enumerate(words)}, default=UNKNOWN, return_dtype=pl.Int64
    ) if words else pl.Series([UNKNOWN] * len(text), dtype=pl.Int64)  # fmt: skip
    missing = torch.from_numpy(text.is_null().to_numpy())
    return torch.where(missing, MISSING, torch.from_numpy(slots.to_numpy(writable=True)))


def _columns(columns: list[Tensor], num_rows: int, dtype: torch.dtype) -> Tensor:
    return torch.stack(columns, 1) if columns else torch.empty((num_rows, 0), dtype=dtype)
