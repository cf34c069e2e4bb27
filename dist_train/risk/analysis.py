"""Every number of a report, from scored rows. The same rows give the same numbers, to the bit, on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dist_train.config.rules import named_positive_class
from dist_train.config.schema import ReportConfig
from dist_train.risk.beside import log_losses, predictions_beside, summary_of
from dist_train.risk.binary import binary_metrics, brier_decomposition, curve, lift_table, reliability_bins
from dist_train.risk.decisions import band_edges, best_threshold, cost_at, score_bands
from dist_train.risk.intervals import bootstrap_intervals
from dist_train.risk.segments import segment_metrics, segments_of, weak_spots
from dist_train.risk.stability import feature_stability, is_number, numbers_of, psi_of_numbers

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class ScoredRows:
    """Rows of a split: the model's own probabilities, (rows, classes), and those that it ships, perhaps calibrated.

    `weights`, (rows,), are 1 where every row counts alike. `features` are the columns of the model, as they stand in
    the table, `segments` those of `report.segments`; both None where there is no table, as for a store.
    """

    own: Floats
    shipped: Floats
    targets: Integers
    weights: Floats
    features: pl.DataFrame | None = None
    segments: pl.DataFrame | None = None


def positive_class(report: ReportConfig, class_names: list[str], train_targets: Integers) -> int:
    """Index of the positive class: `report.positive_class`; without one, that of the fewest training rows.

    Raises:
        UserError: there is no such class.
    """
    named = named_positive_class(report, class_names)
    if named is not None:
        return class_names.index(named)
    counts = np.bincount(train_targets, minlength=len(class_names))
    return int(np.argmin(np.where(counts > 0, counts, counts.max() + 1)))


def analysis_of(
    splits: Mapping[str, ScoredRows], class_names: list[str], report: ReportConfig, *, seed: int
) -> dict[str, Any]:
    """The numbers of report.json; `splits` has `train`, `valid` and `test`, of which the last two may have no rows."""
    held_out = "test" if len(splits["test"].targets) else "valid" if len(splits["valid"].targets) else "train"
    chosen = "valid" if len(splits["valid"].targets) else held_out
    positive = positive_class(report, class_names, splits["train"].targets)
    present = {name: rows for name, rows in splits.items() if len(rows.targets)}
    costs = {"false_positive": report.false_positive_cost, "false_negative": report.false_negative_cost}
    scores, flags, weights = _of_class(splits[chosen], positive)
    threshold = best_threshold(scores, flags, weights, **costs)
    edges = band_edges(scores, weights)
    found: dict[str, Any] = {
        "classes": class_names,
        "positive_class": class_names[positive],
        "reported_on": held_out,
        "chosen_on": chosen,
        "rows": {name: _rows_of(rows, class_names) for name, rows in present.items()},
        "positive": {name: binary_metrics(*_of_class(rows, positive)) for name, rows in present.items()},
        "probabilities": _probabilities(present, positive),
        "per_class": {
            name: binary_metrics(*_of_class(splits[held_out], number)) for number, name in enumerate(class_names)
        },
    }
    rows = splits[held_out]
    found["histogram"] = _histogram(*_of_class(rows, positive))
    found["lift"] = lift_table(*_of_class(rows, positive))
    found["roc"] = curve(*_of_class(rows, positive))
    found["bands"] = score_bands(edges, *_of_class(rows, positive))
    scores, flags, weights = _of_class(rows, positive)
    found["threshold"] = {
        "costs": costs,
        "of_least_cost": cost_at(scores, flags, weights, threshold, **costs),
        "by_theory": cost_at(scores, flags, weights, _by_theory(costs), **costs),
        "nobody_positive": cost_at(scores, flags, weights, 2.0, **costs),
        "all_positive": cost_at(scores, flags, weights, 0.0, **costs),
    }
    found["stability"] = _stability(present, positive)
    found["segments"] = _segments(rows, positive, threshold)
    found["weak_spots"] = _weak_spots(splits, chosen, held_out)
    found["beside"] = _beside(splits, rows, positive, seed, report.bootstrap_repeats) if held_out == "test" else None
    found["intervals"] = _intervals(rows, positive, seed, report.bootstrap_repeats)
    found["features"] = _ranges(splits["train"].features)
    return found


def _of_class(rows: ScoredRows, number: int) -> tuple[Floats, npt.NDArray[np.bool_], Floats]:
    return rows.shipped[:, number], rows.targets == number, rows.weights


def _by_theory(costs: Mapping[str, float]) -> float:
    """Of true probabilities, the threshold of least cost (Elkan 2001)."""
    return costs["false_positive"] / (costs["false_positive"] + costs["false_negative"])


def _rows_of(rows: ScoredRows, class_names: list[str]) -> dict[str, Any]:
    counts = np.bincount(rows.targets, minlength=len(class_names))
    weights = np.bincount(rows.targets, rows.weights, minlength=len(class_names))
    return {
        "rows": len(rows.targets),
        "weight": float(rows.weights.sum()),
        "classes": {
            name: {"rows": int(n), "share": float(w / weights.sum())}
            for name, n, w in zip(class_names, counts, weights, strict=True)
        },
    }


def _probabilities(present: Mapping[str, ScoredRows], positive: int) -> dict[str, Any]:
    """Log loss over all classes, Brier score and its parts, and reliability bins, before and after calibration."""
    found: dict[str, Any] = {}
    for name, rows in present.items():
        found[name] = {}
        for label, predicted in (("own", rows.own), ("shipped", rows.shipped)):
            of_class = (predicted[:, positive], rows.targets == positive, rows.weights)
            found[name][label] = {
                "log_loss": float(np.average(log_losses(predicted, rows.targets), weights=rows.weights)),
                **brier_decomposition(*of_class),
                "bins": reliability_bins(*of_class),
            }
    return found


def _histogram(scores: Floats, positive: npt.NDArray[np.bool_], weights: Floats) -> dict[str, list[float]]:
    """Weights of the rows in twenty bins of equal width, of the positive class and of the others."""
    edges = np.linspace(0, 1, 21)
    groups = {"positive": positive, "others": ~positive}
    counts = {name: np.histogram(scores[rows], edges, weights=weights[rows])[0] for name, rows in groups.items()}
    return {"edges": edges.tolist()} | {name: values.tolist() for name, values in counts.items()}


def _stability(present: Mapping[str, ScoredRows], positive: int) -> dict[str, Any]:
    train = present["train"].shipped[:, positive]
    scores = {name: psi_of_numbers(train, r.shipped[:, positive]) for name, r in present.items() if name != "train"}
    tables = {name: rows.features for name, rows in present.items() if rows.features is not None}
    return {"score": scores, "features": feature_stability(tables) if "train" in tables else None}


def _segments(rows: ScoredRows, positive: int, threshold: float) -> dict[str, Any]:
    if rows.segments is None:
        return {}
    scores, flags, weights = _of_class(rows, positive)
    losses = log_losses(rows.shipped, rows.targets)
    return {
        name: segment_metrics(segments_of(rows.segments[name]), scores, flags, weights, losses, threshold)
        for name in rows.segments.columns
    }


def _weak_spots(splits: Mapping[str, ScoredRows], chosen: str, held_out: str) -> list[dict[str, Any]] | None:
    grown, other = splits[chosen], splits[held_out]
    if grown.features is None or other.features is None:
        return None
    losses = [log_losses(rows.shipped, rows.targets) for rows in (grown, other)]
    return weak_spots(grown.features, losses[0], other.features, losses[1])


def _beside(
    splits: Mapping[str, ScoredRows], rows: ScoredRows, positive: int, seed: int, repeats: int
) -> dict[str, Any] | None:
    """Other models on the same rows; `difference` is their log loss less this model's, with its interval."""
    tables = {name: splits[name].features for name in SPLITS}
    known = {name: table for name, table in tables.items() if table is not None}
    if len(known) < len(SPLITS):
        return None
    targets = {name: splits[name].targets for name in SPLITS}
    weights = {name: splits[name].weights for name in SPLITS}
    predicted, missing = predictions_beside(known, targets, weights, rows.shipped.shape[1], seed=seed)
    losses = {name: log_losses(of_model, rows.targets) for name, of_model in predicted.items()}
    own = log_losses(rows.shipped, rows.targets)

    def differences(drawn: Floats) -> dict[str, float | None]:
        return {name: float(np.average(theirs - own, weights=drawn)) for name, theirs in losses.items()}

    intervals = bootstrap_intervals(differences, rows.weights, repeats=repeats, seed=seed, purpose="beside")
    lines = {"this model": summary_of(rows.shipped, rows.targets, rows.weights, positive)}
    for name, of_model in predicted.items():
        lines[name] = summary_of(of_model, rows.targets, rows.weights, positive)
        lines[name] |= {"difference": differences(rows.weights)[name], "difference_interval": intervals[name]}
    return {"models": lines, "left_out": missing}


def _intervals(rows: ScoredRows, positive: int, seed: int, repeats: int) -> dict[str, list[float] | None]:
    scores, flags, _ = _of_class(rows, positive)
    losses = log_losses(rows.shipped, rows.targets)
    names = ("rate", "auroc", "gini", "ks", "average_precision", "brier")

    def metrics(drawn: Floats) -> dict[str, float | None]:
        kept = drawn > 0
        found = binary_metrics(scores[kept], flags[kept], drawn[kept])
        return {name: found[name] for name in names} | {"loss": float(np.average(losses[kept], weights=drawn[kept]))}

    return bootstrap_intervals(metrics, rows.weights, repeats=repeats, seed=seed, purpose="metrics")


def _ranges(features: pl.DataFrame | None) -> list[dict[str, Any]] | None:
    """Of each column of the training rows: its type, missing share, and its range or number of categories."""
    if features is None:
        return None
    lines = []
    for name in features.columns:
        column = features[name]
        line: dict[str, Any] = {"feature": name, "missing": column.null_count() / max(1, len(column))}
        if is_number(column):
            values = numbers_of(column)
            known = values[~np.isnan(values)]
            line |= {"kind": "number"}
            if len(known):
                low, median, high = np.quantile(known, [0, 0.5, 1])
                line |= {"lowest": float(low), "median": float(median), "highest": float(high)}
        else:
            line |= {"kind": "category", "categories": column.drop_nulls().n_unique()}
        lines.append(line)
    return lines
