"""Class names, which are text, as the labels that a program works with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[Any]


def labels_of(class_names: Sequence[str]) -> Labels:
    """Labels in the order of the class names, as a reader of CSV files would type them, (classes,).

    Whole numbers are int64, `false` and `true` are booleans, everything else is text.
    """
    if all(re.fullmatch("0|-?[1-9][0-9]{0,17}", name) for name in class_names):
        return np.array([int(name) for name in class_names], dtype=np.int64)
    if set(class_names) == {"false", "true"}:
        return np.array([name == "true" for name in class_names])
    return np.array(class_names, dtype=object)
