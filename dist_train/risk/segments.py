"""The same metrics for groups of rows: segments that somebody names, and slices that a shallow tree finds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dist_train.risk.binary import binary_metrics, quantile_edges
from dist_train.risk.intervals import share_interval
from dist_train.risk.stability import is_number, numbers_of

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MOST_SEGMENTS = 12
FEWEST_ROWS = 50
OTHERS = "(others)"
MISSING = "(missing)"


def segments_of(column: pl.Series) -> list[str]:
    """The segment of each row: its category, or the quarter of its number.

    Categories of fewer than 50 rows, and those after the 12 most frequent, are one segment, `(others)`.
    """
    if is_number(column) and column.n_unique() > MOST_SEGMENTS:
        return _quarters(numbers_of(column))
    text = [MISSING if value is None else value for value in column.cast(pl.String).to_list()]
    names, counts = np.unique(np.array(text, dtype=object).astype(str), return_counts=True)
    largest = sorted(zip(-counts, names, strict=True))[:MOST_SEGMENTS]
    kept = {str(name) for count, name in largest if -count >= FEWEST_ROWS}
    return [value if value in kept else OTHERS for value in text]


def _quarters(values: Floats) -> list[str]:
    known = values[~np.isnan(values)]
    edges = quantile_edges(known, np.ones(len(known)), 4)
    bounds = [float(known.min()), *edges.tolist(), float(known.max())]
    names = [f"{low:g} to {high:g}" for low, high in pairwise(bounds)]
    return [MISSING if np.isnan(v) else names[int(np.searchsorted(edges, v, side="right"))] for v in values]


def segment_metrics(
    segments: list[str], scores: Floats, positive: Flags, weights: Floats, losses: Floats, threshold: float
) -> dict[str, Any]:
    """Of each segment the metrics of the positive class, who is selected at a threshold, and how much is missed.

    `adverse_impact_ratio`: the share that is not selected, as of granted applications, by the largest such share of a
    segment (`(others)` aside); below 0.8 it fails the four-fifths rule of the EEOC (1978). `loss` is the mean of
    `losses`. The gaps of recall and of the false positive rate are those of equalised odds (Hardt et al. 2016).
    """
    own = np.array(segments, dtype=object)
    lines: list[dict[str, Any]] = []
    for name in sorted(set(segments)):
        here = own == name
        weight = float(weights[here].sum())
        if not weight:
            continue
        line: dict[str, Any] = {"segment": name, "count": int(here.sum())}
        line |= binary_metrics(scores[here], positive[here], weights[here])
        line["rate_interval"] = share_interval(float(line["positives"]), weight)
        line["loss"] = float(np.average(losses[here], weights=weights[here]))
        selected = here & (scores >= threshold)
        line["selected"] = float(weights[selected].sum()) / weight
        negatives = float(weights[here & ~positive].sum())
        line["false_positive_rate"] = float(weights[selected & ~positive].sum()) / negatives if negatives else None
        line["recall"] = float(weights[selected & positive].sum()) / line["positives"] if line["positives"] else None
        lines.append(line)
    passed = [1 - line["selected"] for line in lines if line["segment"] != OTHERS]
    for line in lines:
        line["adverse_impact_ratio"] = (1 - line["selected"]) / max(passed) if passed and max(passed) else None
    return {
        "segments": lines,
        "recall_gap": _gap(lines, "recall"),
        "false_positive_gap": _gap(lines, "false_positive_rate"),
    }


def _gap(lines: list[dict[str, Any]], metric: str) -> float | None:
    """The largest less the smallest of the segments, `(others)` aside."""
    found = [line[metric] for line in lines if line[metric] is not None and line["segment"] != OTHERS]
    return max(found) - min(found) if found else None


def weak_spots(
    valid: pl.DataFrame, valid_losses: Floats, test: pl.DataFrame, test_losses: Floats, *, most: int = 5
) -> list[dict[str, Any]]:
    """Slices of the rows in which the loss is high: leaves of a tree of depth 3 that is grown on validation rows.

    The loss of a slice is that of the test rows in it. Slices hold at least 5 % of the validation rows, and at least
    50. In order of the loss on test rows, those above the mean.
    """
    from sklearn.tree import DecisionTreeRegressor

    columns = [name for name in valid.columns if is_number(valid[name]) or valid[name].n_unique() <= 50]
    if len(valid) < 4 * FEWEST_ROWS or not columns or not len(test):
        return []
    inputs, names = _as_numbers(valid, columns)
    fewest = max(FEWEST_ROWS, len(valid) // 20)
    tree = DecisionTreeRegressor(max_depth=3, min_samples_leaf=fewest, random_state=0).fit(inputs, valid_losses)
    leaf = tree.apply(_as_numbers(test, columns, names)[0])
    mean = float(test_losses.mean())
    found: list[dict[str, Any]] = []
    for node, path in _paths(tree.tree_, columns, names).items():
        here = leaf == node
        if here.any():
            loss = float(test_losses[here].mean())
            found.append({"slice": path, "rows": int(here.sum()), "loss": loss, "ratio": loss / mean})
    return sorted((spot for spot in found if spot["ratio"] > 1), key=lambda spot: -spot["loss"])[:most]


def _as_numbers(
    table: pl.DataFrame, columns: list[str], names: dict[str, list[str]] | None = None
) -> tuple[npt.NDArray[np.float64], dict[str, list[str]]]:
    """Columns for a tree: numbers, and the places of categories in alphabetical order; missing is -1 or the least.

    `names` are the categories of each column that is no number, as found in another table; they are returned as well.
    """
    if names is None:
        texts = [name for name in columns if not is_number(table[name])]
        names = {name: sorted(set(table[name].cast(pl.String).drop_nulls())) for name in texts}
    made = []
    for name in columns:
        if name not in names:
            values = numbers_of(table[name])
            made.append(np.where(np.isnan(values), -np.finfo(np.float32).max, np.clip(values, -1e38, 1e38)))
        else:
            place = {text: float(i) for i, text in enumerate(names[name])}
            made.append(np.array([place.get(text, -1.0) for text in table[name].cast(pl.String).to_list()]))
    return np.stack(made, axis=1), names


def _paths(tree: Any, columns: list[str], names: dict[str, list[str]]) -> dict[int, str]:
    """Leaf -> its conditions in words."""
    found: dict[int, str] = {}

    def walk(node: int, bounds: dict[int, tuple[float, float]]) -> None:
        if tree.children_left[node] < 0:
            found[node] = (
                " and ".join(_words(columns[f], b, names.get(columns[f])) for f, b in bounds.items()) or "all rows"
            )
            return
        feature, at = int(tree.feature[node]), float(tree.threshold[node])
        low, high = bounds.get(feature, (-np.inf, np.inf))
        walk(int(tree.children_left[node]), bounds | {feature: (low, min(high, at))})
        walk(int(tree.children_right[node]), bounds | {feature: (max(low, at), high)})

    walk(0, {})
    return found


def _words(name: str, bounds: tuple[float, float], categories: list[str] | None) -> str:
    """The condition of a column, whose `categories` are None where it is one of numbers."""
    low, high = bounds
    if categories is not None:
        inside = [text for place, text in enumerate(categories) if low < place <= high]
        return f"{name} in {{{', '.join(inside[:6])}{', ...' if len(inside) > 6 else ''}}}"
    if np.isinf(low):
        return f"{name} <= {high:g}"
    return f"{name} > {low:g}" if np.isinf(high) else f"{low:g} < {name} <= {high:g}"
