"""Metrics of the positive class, against scikit-learn, scipy, and their definitions row by row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import sklearn.metrics as sk
from scipy.stats import binomtest, ks_2samp

from dist_train.risk.binary import binary_metrics, brier_decomposition, curve, lift_table, reliability_bins
from dist_train.risk.decisions import band_edges, best_threshold, cost_at, score_bands
from dist_train.risk.intervals import bootstrap_intervals, share_interval
from dist_train.risk.segments import OTHERS, segment_metrics, segments_of, weak_spots
from dist_train.risk.stability import feature_stability, population_stability_index, psi_of_numbers

Scored = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.float64]]


def scored(rows: int = 600, *, ties: bool = False) -> Scored:
    """Scores that are true, their classes, and weights of rows."""
    rng = np.random.default_rng([rows, ties])
    scores = rng.beta(1, 4, rows)
    scores = scores.round(1) if ties else scores
    return scores, rng.random(rows) < scores, rng.integers(0, 4, rows).astype(np.float64)


@pytest.mark.parametrize("ties", [False, True])
def test_equal_to_scikit_learn_and_scipy(ties: bool) -> None:
    scores, positive, weights = scored(ties=ties)
    plain, weighted = binary_metrics(scores, positive), binary_metrics(scores, positive, weights)
    for found, own in ((plain, None), (weighted, weights)):
        assert found["auroc"] == pytest.approx(sk.roc_auc_score(positive, scores, sample_weight=own))
        assert found["gini"] == pytest.approx(2 * sk.roc_auc_score(positive, scores, sample_weight=own) - 1)
        expected = sk.average_precision_score(positive, scores, sample_weight=own)
        assert found["average_precision"] == pytest.approx(expected)
        assert found["brier"] == pytest.approx(sk.brier_score_loss(positive, scores, sample_weight=own))
        assert found["log_loss"] == pytest.approx(sk.log_loss(positive, scores, sample_weight=own))
    assert plain["ks"] == pytest.approx(ks_2samp(scores[positive], scores[~positive]).statistic)
    repeated = np.repeat(np.arange(len(scores)), weights.astype(int))
    assert weighted == pytest.approx(binary_metrics(scores[repeated], positive[repeated]))


def test_a_group_without_rows() -> None:
    found = binary_metrics(np.array([0.2, 0.7]), np.array([False, False]))
    assert [found[name] for name in ("auroc", "gini", "ks", "average_precision")] == [None] * 4
    assert found["rate"] == 0
    assert curve(np.array([0.2, 0.7]), np.array([False, False])) is None


def test_lift_and_capture() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    positive = np.array([True, True, False, True, False, False, False, False, False, False])
    first, second = lift_table(scores, positive, depths=(0.2, 0.5))
    assert first == pytest.approx({"depth": 0.2, "rate": 1.0, "lift": 1 / 0.3, "capture": 2 / 3})
    assert second == pytest.approx({"depth": 0.5, "rate": 0.6, "lift": 2.0, "capture": 1.0})
    constant = lift_table(np.full(10, 0.3), positive, depths=(0.2,))[0]
    assert constant["lift"] == pytest.approx(1)  # rows of one score count in part


@pytest.mark.parametrize("weighted", [False, True])
def test_the_parts_of_the_brier_score(weighted: bool) -> None:
    scores, positive, weights = scored(ties=True)
    own = weights if weighted else None
    parts = brier_decomposition(scores, positive, own, num_bins=6000)  # one bin for each score
    assert parts["within"] == pytest.approx(0, abs=1e-12)
    assert parts["brier"] == pytest.approx(sk.brier_score_loss(positive, scores, sample_weight=own))
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"]
    assert total == pytest.approx(parts["brier"])
    coarse = brier_decomposition(scores, positive, own, num_bins=3)
    whole = coarse["reliability"] - coarse["resolution"] + coarse["uncertainty"] + coarse["within"]
    assert whole == pytest.approx(parts["brier"])


def test_bins_hold_each_row_once() -> None:
    scores, positive, weights = scored()
    bins = reliability_bins(scores, positive, weights)
    assert len(bins) == 10
    assert sum(each["weight"] for each in bins) == weights.sum()
    assert all(abs(each["weight"] / weights.sum() - 0.1) < 0.01 for each in bins)
    assert reliability_bins(np.full(5, 0.5), np.array([True] * 5))[0]["rate"] == 1


def test_the_threshold_of_least_cost() -> None:
    scores, positive, weights = scored()
    costs = {"false_positive": 1.0, "false_negative": 5.0}
    best = cost_at(scores, positive, weights, best_threshold(scores, positive, weights, **costs), **costs)
    candidates = [cost_at(scores, positive, weights, t, **costs)["cost"] for t in [0.0, *scores, 2.0]]
    assert best["cost"] == pytest.approx(min(c for c in candidates if c is not None))
    selected = scores >= best["threshold"]
    assert best["precision"] == pytest.approx(sk.precision_score(positive, selected, sample_weight=weights))
    assert best["recall"] == pytest.approx(sk.recall_score(positive, selected, sample_weight=weights))
    worthless = np.full(4, 0.3)
    assert best_threshold(worthless, np.array([True] * 4), np.ones(4), **costs) == 0
    assert best_threshold(worthless, np.array([False] * 4), np.ones(4), **costs) > 1


def test_bands_and_their_order() -> None:
    scores, positive, weights = scored(5000)
    found = score_bands(band_edges(scores, weights, 5), scores, positive, weights)
    assert [band["from"] for band in found["bands"]][1:] == [band["to"] for band in found["bands"]][:-1]
    assert sum(band["rows"] for band in found["bands"]) == 5000
    assert found["monotone"]
    turned = score_bands(band_edges(scores, weights, 5), scores, ~positive, weights)
    assert turned["inversions"] == turned["significant_inversions"] == 4


def test_intervals() -> None:
    theirs = binomtest(7, 40).proportion_ci(method="wilson")
    assert share_interval(7, 40) == pytest.approx([theirs.low, theirs.high])
    assert all(share_interval(0, n)[0] == 0 and share_interval(n, n)[1] == 1 for n in range(1, 200))
    values = np.random.default_rng(0).normal(size=400)

    def mean(weights: npt.NDArray[np.float64]) -> dict[str, float | None]:
        return {"mean": float(np.average(values, weights=weights)), "never": None}

    found = bootstrap_intervals(mean, np.ones(400), repeats=500, seed=1, purpose="test")
    half = 1.96 * values.std() / 20
    assert found["mean"] == pytest.approx([values.mean() - half, values.mean() + half], abs=half / 4)
    assert found["never"] is None
    assert found == bootstrap_intervals(mean, np.ones(400), repeats=500, seed=1, purpose="test")
    assert found != bootstrap_intervals(mean, np.ones(400), repeats=500, seed=2, purpose="test")


def test_population_stability() -> None:
    p, q = np.array([50.0, 30.0, 20.0]), np.array([30.0, 30.0, 40.0])
    expected = sum((b - a) * np.log(b / a) for a, b in zip(p / 100, q / 100, strict=True))
    assert population_stability_index(p, q) == pytest.approx(expected)
    values = np.random.default_rng(0).normal(size=4000)
    assert psi_of_numbers(values[:2000], values[2000:]) < 0.02
    assert psi_of_numbers(values[:2000], values[2000:] + 1) > 0.25
    holes = np.where(np.arange(2000) % 2, np.nan, values[2000:])
    assert psi_of_numbers(values[:2000], holes) > 0.25


def test_a_feature_that_moved_comes_first() -> None:
    rng = np.random.default_rng(0)
    train = pl.DataFrame({"same": rng.normal(size=500), "branch": rng.choice(["a", "b"], 500)})
    test = pl.DataFrame({"same": rng.normal(size=500), "branch": ["a"] * 250 + [None] * 250})
    first, second = feature_stability({"train": train, "test": test})
    assert first["feature"] == "branch"
    assert first["missing"]["test"] == 0.5
    assert first["psi"]["test"] > 0.25 > second["psi"]["test"]


def test_segments_fold_small_groups_and_cut_numbers() -> None:
    column = pl.Series("region", ["north"] * 60 + ["south"] * 70 + ["island"] * 3 + [None] * 55)
    assert set(segments_of(column)) == {"north", "south", OTHERS, "(missing)"}
    assert len(set(segments_of(pl.Series("age", list(range(100)))))) == 4
    scores, positive, weights = scored()
    names = ["a" if i % 2 else "b" for i in range(600)]
    found = segment_metrics(names, scores, positive, weights, -np.log(np.where(positive, scores, 1 - scores)), 0.3)
    a, b = found["segments"]
    odd = np.arange(600) % 2 == 1
    assert a["auroc"] == pytest.approx(sk.roc_auc_score(positive[odd], scores[odd], sample_weight=weights[odd]))
    assert a["recall"] == pytest.approx(sk.recall_score(positive[odd], scores[odd] >= 0.3, sample_weight=weights[odd]))
    assert found["recall_gap"] == pytest.approx(abs(a["recall"] - b["recall"]))
    passed = [1 - a["selected"], 1 - b["selected"]]
    assert min(a["adverse_impact_ratio"], b["adverse_impact_ratio"]) == pytest.approx(min(passed) / max(passed))


@pytest.mark.parametrize("branches", [["a", "b", "c"], ["10", "20", "30"]])
def test_a_weak_spot_is_found(branches: list[str]) -> None:
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"x": rng.normal(size=2000), "branch": rng.choice(branches, 2000)})
    losses = np.where((table["branch"] == branches[1]).to_numpy() & (table["x"] > 0).to_numpy(), 2.0, 0.5)
    losses = losses + 0.1 * rng.random(2000)
    spot = weak_spots(table[:1000], losses[:1000], table[1000:], losses[1000:])[0]
    assert f"branch in {{{branches[1]}}}" in spot["slice"]
    assert "x > " in spot["slice"]
    assert spot["loss"] > 1.9
