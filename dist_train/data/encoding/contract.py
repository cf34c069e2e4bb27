"""What the cells of a column were in the training rows, and how other cells differ: one rule for tables and records.

It imports neither torch nor polars, which a process that serves an exported file does not load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

MISSING_CELL = "missing, and no cell was in training"
UNKNOWN_CATEGORY = "a category that the model does not know"
BELOW, ABOVE = (f"{where} the range of the training rows" for where in ("below", "above"))

Numbers = TypeVar("Numbers", bound=Any)
"""A number, or an array or a tensor of numbers."""


@dataclass(frozen=True, kw_only=True)
class ColumnContract:
    """A column of the training rows.

    `had_missing`: some of its cells were missing. `known`: the texts that are a category; None where the cells are
    numbers, or where categories are found by their codes. `low` and `high`: the smallest and the largest number,
    without bound where they are not known, of a column of one number, which a model ignores, and of dates, of which new
    rows have later ones.
    """

    name: str
    had_missing: bool = True
    known: frozenset[str] | None = None
    low: float = -math.inf
    high: float = math.inf

    def problem(self, cell: float | str) -> str | None:
        """How a cell differs, without its value; None: it does not. A missing cell is `""` or NaN."""
        if cell == "" or cell != cell:
            return None if self.had_missing else MISSING_CELL
        if isinstance(cell, str):
            return None if self.known is None or cell in self.known else UNKNOWN_CATEGORY
        if not outside(cell, self.low, self.high):
            return None
        return BELOW if cell < self.low else ABOVE

    def to_json(self) -> dict[str, Any]:
        """The range and the missing cells as JSON types; `from_json` reads them."""
        bounded = math.isfinite(self.low) and math.isfinite(self.high)
        return {"missing_in_training": self.had_missing} | ({"range": [self.low, self.high]} if bounded else {})

    @classmethod
    def from_json(cls, content: Mapping[str, Any], known: frozenset[str] | None) -> ColumnContract:
        """What `to_json` wrote, with the name of the column."""
        low, high = content.get("range") or (-math.inf, math.inf)
        had_missing = content.get("missing_in_training", True)
        return cls(name=content["name"], had_missing=had_missing, known=known, low=low, high=high)


def outside(values: Numbers, low: Any, high: Any) -> Numbers:
    """Whether numbers are outside of a range; NaN is not. Numbers and bounds may be tensors whose shapes broadcast."""
    found: Numbers = (values < low) | (values > high)
    return found
