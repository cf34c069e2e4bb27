"""What a model may know of the columns of a table: plain numbers and names, saved beside the weights as JSON."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dist_train.config.compatibility import FORMATS, require_format
from dist_train.data.cells.readings import Reading

FORMAT_WITHOUT_READINGS = 2
"""An earlier program reads a spec without readings."""

MISSING, UNKNOWN, FIRST_CATEGORY = 0, 1, 2
"""Codes of a categorical column: a missing cell, a category that is not in the vocabulary, the first category."""

NUM_QUANTILES = 33
"""Quantiles kept of a numeric column, evenly spaced from the smallest to the largest training value."""
NUM_TRANSFORM_QUANTILES = 257
"""The same where the column is encoded by its quantiles."""

_KEPT_APART = ("bins", "target_edges")
"""Fields of a numeric column that are kept beside the columns, where earlier releases skip them."""


@dataclass(frozen=True, kw_only=True)
class NumericColumn:
    """A column of numbers as it was fitted to the training rows.

    `data/encoding/scaling.py` says how a value is encoded: by `median` and `scale` where `transform` is robust, by
    `quantiles` where it is quantile; a missing cell as 0. A scale of 0 means that the training rows hold one value or
    none.
    `quantiles` are of the values themselves: `NUM_QUANTILES` of them, or `NUM_TRANSFORM_QUANTILES` where they encode,
    or none where there were no values or the spec was written before they were kept.
    `bins` counts the training rows as `data/encoding/drift.py` does, (bins + 1,): those between two edges, and the
    missing ones last; it is empty where the spec was written before they were kept.
    `target_edges` are the edges of bins by the target (`data/stores/target_bins.py`), where a model asks for them, else
    none.
    """

    name: str
    median: float
    scale: float
    has_missing_flag: bool
    quantiles: tuple[float, ...] = ()
    transform: str = "robust"
    bins: tuple[int, ...] = ()
    target_edges: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CategoricalColumn:
    """A column of categories: code 0 is a missing cell, 1 an unknown category, `2 + i` the category `categories[i]`.

    Where there are `hash_buckets`, as many codes follow, and a text that is no category has the one that its CRC-32
    gives: no text is unknown then. `seen_in_training` says of each code whether it occurred in the training rows,
    (size,); `counts` says how often, or is empty where the spec was written before they were kept.
    """

    name: str
    categories: tuple[str, ...]
    seen_in_training: tuple[bool, ...]
    counts: tuple[int, ...] = ()
    hash_buckets: int = 0

    @property
    def size(self) -> int:
        """Number of codes."""
        return FIRST_CATEGORY + len(self.categories) + self.hash_buckets

    def code_of_others(self, text: str) -> int:
        """The code of a text that is no category."""
        if not self.hash_buckets:
            return UNKNOWN
        return FIRST_CATEGORY + len(self.categories) + zlib.crc32(text.encode()) % self.hash_buckets


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """The feature columns of a table, and its classes in the order of the logits.

    A model gets three tensors for each batch: numeric (rows, num_numeric) floating point, flags (rows, num_flags)
    uint8, 1 where the cell of a column with `has_missing_flag` is missing, and codes (rows, num_categorical) integer.

    `readings` say how amounts and dates are read: their numeric features are named here, not their columns.
    """

    numeric: tuple[NumericColumn, ...]
    categorical: tuple[CategoricalColumn, ...]
    class_names: tuple[str, ...]
    readings: tuple[Reading, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the columns that are read, numbers first."""
        columns = self.columns_of_features
        numeric = dict.fromkeys(columns.get(column.name, column.name) for column in self.numeric)
        return [*numeric, *(column.name for column in self.categorical)]

    @property
    def columns_of_features(self) -> dict[str, str]:
        """Numeric feature that is made by a reading -> the column that it is made of."""
        return {feature: reading.column for reading in self.readings for feature in reading.features}

    @property
    def columns_of_inputs(self) -> tuple[list[str], list[str], list[str]]:
        """The column of the table that each number, each flag and each code is of."""
        made = self.columns_of_features
        numbers = [made.get(column.name, column.name) for column in self.numeric]
        flagged = [made.get(column.name, column.name) for column in self.numeric if column.has_missing_flag]
        return numbers, flagged, [column.name for column in self.categorical]

    @property
    def num_numeric(self) -> int:
        """Numeric columns."""
        return len(self.numeric)

    @property
    def num_flags(self) -> int:
        """Numeric columns with a flag for missing cells."""
        return sum(column.has_missing_flag for column in self.numeric)

    @property
    def num_categorical(self) -> int:
        """Categorical columns."""
        return len(self.categorical)

    @property
    def category_sizes(self) -> tuple[int, ...]:
        """Number of codes of each categorical column, those for missing and unknown included."""
        return tuple(column.size for column in self.categorical)

    @property
    def num_columns(self) -> int:
        """Feature columns of the table."""
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.class_names)

    def matches(self, other: FeatureSpec) -> bool:
        """Whether both encode every table to the same bits. Quantiles and counts count only where both have them."""
        if len(self.numeric) != len(other.numeric) or len(self.categorical) != len(other.categorical):
            return False
        return self._known_to(other) == other._known_to(self)

    def to_json(self) -> dict[str, Any]:
        """As JSON types, which keep every bit of a float64; `from_json` reads it."""
        content = {
            "format": FORMATS["feature spec"] if self.readings else FORMAT_WITHOUT_READINGS,
            "numeric": [
                {name: value for name, value in vars(column).items() if name not in _KEPT_APART}
                | {"quantiles": list(column.quantiles)}
                for column in self.numeric
            ],
            "categorical": [
                {name: list(value) if isinstance(value, tuple) else value for name, value in vars(column).items()}
                for column in self.categorical
            ],
            "class_names": list(self.class_names),
        }
        readings = [{**vars(reading), "parts": list(reading.parts)} for reading in self.readings]
        apart = {
            key: {column.name: list(getattr(column, key)) for column in self.numeric if getattr(column, key)}
            for key in _KEPT_APART
        }
        return content | {key: value for key, value in {"readings": readings, **apart}.items() if value}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FeatureSpec:
        """What `to_json` wrote.

        Raises:
            UserError: a later release wrote it.
        """
        require_format("feature spec", content.get("format"), "the model's preprocessing")
        return cls(
            numeric=tuple(
                NumericColumn(
                    **{**column, "quantiles": tuple(column["quantiles"])}
                    | {key: tuple(content.get(key, {}).get(column["name"], ())) for key in _KEPT_APART}
                )
                for column in content["numeric"]
            ),
            categorical=tuple(
                CategoricalColumn(
                    name=column["name"],
                    categories=tuple(column["categories"]),
                    seen_in_training=tuple(column["seen_in_training"]),
                    counts=tuple(column.get("counts", ())),
                    hash_buckets=column.get("hash_buckets", 0),
                )
                for column in content["categorical"]
            ),
            class_names=tuple(content["class_names"]),
            readings=tuple(Reading.from_json(reading) for reading in content.get("readings", ())),
        )

    def _known_to(self, other: FeatureSpec) -> FeatureSpec:
        """This spec without the quantiles and counts of columns for which the other one has none."""
        pairs = zip(self.numeric, other.numeric, strict=True)
        numeric = (
            replace(
                one,
                quantiles=one.quantiles if two.quantiles else (),
                bins=one.bins if two.bins else (),
                target_edges=one.target_edges if two.target_edges else (),
            )
            for one, two in pairs
        )
        words = zip(self.categorical, other.categorical, strict=True)
        categorical = (one if two.counts else replace(one, counts=()) for one, two in words)
        return replace(self, numeric=tuple(numeric), categorical=tuple(categorical))


def spec_of_encoder(description: Mapping[str, Any], tensors: Mapping[str, Sequence[Any]]) -> FeatureSpec:
    """The spec of an encoder as release 0.1 saved it: its description, and its tensors (or lists of their numbers)."""
    median, scale, flagged = tensors["median"], tensors["scale"], tensors["flagged"]
    seen = [bool(flag) for flag in tensors["seen"]]
    categorical, first = [], 0
    for name, categories in description["categories"].items():
        last = first + FIRST_CATEGORY + len(categories)
        categorical.append(
            CategoricalColumn(name=name, categories=tuple(categories), seen_in_training=tuple(seen[first:last]))
        )
        first = last
    return FeatureSpec(
        numeric=tuple(
            NumericColumn(name=name, median=float(median[i]), scale=float(scale[i]), has_missing_flag=bool(flagged[i]))
            for i, name in enumerate(description["numeric"])
        ),
        categorical=tuple(categorical),
        class_names=tuple(description["class_names"]),
    )
