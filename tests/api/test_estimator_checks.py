"""scikit-learn's own checks of an estimator."""

from __future__ import annotations

from typing import Any

from sklearn.utils.estimator_checks import parametrize_with_checks

from dist_train import Classifier

# Few steps, and one evaluation at the end.
ESTIMATOR = Classifier(
    epochs=6,
    batch_size=32,
    learning_rate=1e-2,
    device="cpu",
    overrides=("model.hidden_dim=32", "evaluation.every_steps=1000000", "log.every_steps=1000000"),
)

EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": (
        "a row of weight 2 stands in one batch and in one split; two rows stand in different ones"
    ),
}


@parametrize_with_checks([ESTIMATOR], expected_failed_checks=lambda _: EXPECTED_FAILURES)
def test_scikit_learn_accepts_the_estimator(estimator: Any, check: Any) -> None:
    check(estimator)
