"""Other projects' tools on the public API: each runs where it is installed (the extra `interop`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_train import Classifier, load

pd = pytest.importorskip("pandas")

ROWS = 400
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other projects


def table() -> tuple[pd.DataFrame, np.ndarray]:
    """Two columns that matter, one that does not, categories, and the class."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "income": random.normal(size=ROWS),
            "debt": random.normal(size=ROWS),
            "noise": random.normal(size=ROWS),
            "region": random.choice(["north", "south"], ROWS),
        }
    )
    score = 2 * frame["income"] - frame["debt"] + 0.5 * (frame["region"] == "north")
    return frame, np.where(score + 0.3 * random.normal(size=ROWS) > 0, "yes", "no")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    folder = tmp_path_factory.mktemp("interop") / "run"
    classifier = Classifier(epochs=6, device="cpu", random_state=0, learning_rate=0.02, run_dir=str(folder))
    return classifier.fit(*table()), folder


def test_shap_explains_the_probabilities(fitted: tuple[Classifier, Path]) -> None:
    shap = pytest.importorskip("shap")
    classifier, frame = fitted[0], table()[0].drop(columns="region")

    def probability(values: np.ndarray) -> np.ndarray:
        rows = pd.DataFrame(values, columns=frame.columns).assign(region="north")
        return classifier.predict_proba(rows)[:, 1]

    explainer = shap.KernelExplainer(probability, frame.to_numpy()[:10])
    values = explainer.shap_values(frame.to_numpy()[20:28], silent=True)
    np.testing.assert_allclose(
        values.sum(1) + explainer.expected_value, probability(frame.to_numpy()[20:28]), rtol=0, atol=1e-6
    )
    income, debt, noise = np.abs(values).mean(0)
    assert income > noise < debt


def test_fairlearn_compares_groups_and_moves_thresholds(fitted: tuple[Classifier, Path]) -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    from fairlearn.postprocessing import ThresholdOptimizer
    from sklearn.metrics import accuracy_score

    classifier, (frame, labels) = fitted[0], table()
    groups = frame["region"]
    found = metrics.MetricFrame(
        metrics=accuracy_score, y_true=labels, y_pred=classifier.predict(frame), sensitive_features=groups
    )
    for name in ("north", "south"):
        here = groups == name
        assert found.by_group[name] == pytest.approx(classifier.score(frame[here], labels[here]))
    optimizer = ThresholdOptimizer(estimator=classifier, prefit=True, predict_method="predict_proba")
    optimizer.fit(frame, (labels == "yes").astype(int), sensitive_features=groups)
    chosen = optimizer.predict(frame, sensitive_features=groups, random_state=0)
    rates = [chosen[groups == name].mean() for name in ("north", "south")]
    assert abs(rates[0] - rates[1]) < 0.1


def test_mapie_gives_sets_that_hold_the_class_as_often_as_asked(fitted: tuple[Classifier, Path]) -> None:
    classification = pytest.importorskip("mapie.classification")
    classifier, (frame, labels) = fitted[0], table()
    conformal = classification.SplitConformalClassifier(estimator=classifier, confidence_level=0.9, prefit=True)
    conformal.conformalize(frame[:200], labels[:200])
    predicted, sets = conformal.predict_set(frame[200:])
    assert (predicted == classifier.predict(frame[200:])).all()
    held = sets[np.arange(200), np.searchsorted(classifier.classes_, labels[200:]), 0]
    assert held.mean() > 0.8  # 0.9 in the mean; of 200 rows it is below 0.8 once in 10,000 times


def test_skops_saves_the_estimator_without_pickle(fitted: tuple[Classifier, Path], tmp_path: Path) -> None:
    skops = pytest.importorskip("skops.io")
    classifier, frame = fitted[0], table()[0]
    skops.dump(classifier, tmp_path / "classifier.skops")
    unknown = skops.get_untrusted_types(file=tmp_path / "classifier.skops")
    assert unknown == ["dist_train.api.classifier.Classifier"]
    again = skops.load(tmp_path / "classifier.skops", trusted=unknown)
    np.testing.assert_array_equal(again.predict_proba(frame), classifier.predict_proba(frame))


def test_mlflow_serves_the_trained_model_as_a_python_function(
    fitted: tuple[Classifier, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    pyfunc = pytest.importorskip("mlflow.pyfunc")
    (tmp_path / "scorer.py").write_text(SCORER)
    artifacts = {"model": str(fitted[1] / "model")}
    pyfunc.save_model(
        tmp_path / "saved", python_model=str(tmp_path / "scorer.py"), artifacts=artifacts,
        pip_requirements=["dist_train"],
    )  # fmt: skip
    frame = table()[0]
    found = pyfunc.load_model(str(tmp_path / "saved")).predict(frame)
    assert list(found.columns) == ["no", "yes"]
    np.testing.assert_array_equal(found.to_numpy(), load(fitted[1] / "model").predict_proba(frame))


SCORER = """
import mlflow
import pandas
from dist_train import load


class Scorer(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.model = load(context.artifacts["model"])

    def predict(self, context, model_input, params=None):
        return pandas.DataFrame(self.model.predict_proba(model_input), columns=self.model.class_names)


mlflow.models.set_model(Scorer())
"""
