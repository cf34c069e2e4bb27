"""The labels of a program -> a column of text whose cells are the class names of the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.utils import assert_all_finite, check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from dist_train.data.tables.table import as_text
from dist_train.errors import UserError


@dataclass(frozen=True)
class Target:
    """Labels of the rows.

    `labels` are the distinct ones, sorted, (classes,), and `names` their class names; `cells`, (rows,), are the names
    of the rows' labels, for a column called `name`.
    """

    name: str
    labels: npt.NDArray[Any]
    names: list[str]
    cells: list[str]

    @classmethod
    def of(cls, y: Any, table: pl.DataFrame) -> Target:
        """The target of the rows of a table.

        Raises:
            ValueError: labels are missing, are quantities, do not fit the rows, or are all the same.
        """
        if y is None:
            raise UserError("fit requires y to be passed, but the target y is None")
        values = column_or_1d(np.asarray(y), warn=True)
        check_consistent_length(table, values)
        _check_labels(values)
        labels, index = np.unique(values, return_inverse=True)
        if len(labels) < 2:
            raise UserError(f"y has only one class, {labels.tolist()}: two or more are needed")
        names = as_text(pl.Series("y", [_text(label) for label in labels.tolist()]), "y").to_list()
        if len(set(names)) < len(names):
            raise UserError(f"two labels in y have the same class name: {', '.join(names)}")
        name = getattr(y, "name", None)
        name = name if isinstance(name, str) and name.strip() else "target"
        return cls(free_name(name, table.columns), labels, names, [names[i] for i in index])

    def order(self, class_names: Sequence[str]) -> list[int]:
        """Places of the labels among the class names of a model."""
        return [list(class_names).index(name) for name in self.names]


def _check_labels(values: npt.NDArray[Any]) -> None:
    if values.dtype.kind == "O":
        missing = [row for row, label in enumerate(values) if label is None or label != label]  # NaN is not itself
        if missing:
            raise UserError(f"y: the label of row {missing[0] + 1} is missing")
    else:
        assert_all_finite(values, input_name="y")
    check_classification_targets(values)


def _text(label: Any) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def free_name(name: str, taken: Sequence[str]) -> str:
    """The name, or another one like it where a column has it."""
    free = name
    while free in taken:
        free += "_"
    return free
