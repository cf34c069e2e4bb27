"""Segments of the report against fairlearn's MetricFrame."""

from __future__ import annotations

import numpy as np
import pytest

from dist_train.risk.segments import segment_metrics


@pytest.mark.slow  # fairlearn takes seconds to import
def test_shares_recalls_and_ratios_are_those_of_fairlearn() -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    rng = np.random.default_rng(2)
    groups = rng.choice(["a", "b", "c"], 900)
    positive = rng.random(900) < 0.3
    scores = np.clip(0.25 * positive + 0.1 * (groups == "b") + rng.random(900) * 0.6, 0, 1)
    weights = rng.integers(1, 4, 900).astype(float)
    losses = np.zeros(900)
    found = segment_metrics(groups.tolist(), scores, positive, weights, losses, 0.5)
    frame = metrics.MetricFrame(
        metrics={
            "selected": metrics.selection_rate,
            "recall": metrics.true_positive_rate,
            "false_positive_rate": metrics.false_positive_rate,
        },
        y_true=positive,
        y_pred=scores >= 0.5,
        sensitive_features=groups,
        sample_params={key: {"sample_weight": weights} for key in ("selected", "recall", "false_positive_rate")},
    )
    by_group = frame.by_group
    for line in found["segments"]:
        assert line["selected"] == pytest.approx(by_group.loc[line["segment"], "selected"])
        assert line["recall"] == pytest.approx(by_group.loc[line["segment"], "recall"])
        assert line["false_positive_rate"] == pytest.approx(by_group.loc[line["segment"], "false_positive_rate"])
    assert found["recall_gap"] == pytest.approx(frame.difference()["recall"])
    assert found["false_positive_gap"] == pytest.approx(frame.difference()["false_positive_rate"])
    granted = metrics.demographic_parity_ratio(positive, scores < 0.5, sensitive_features=groups, sample_weight=weights)
    assert min(line["adverse_impact_ratio"] for line in found["segments"]) == pytest.approx(granted)
