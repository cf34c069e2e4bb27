"""The scikit-learn estimator."""

from __future__ import annotations

import logging
import pickle
import random
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch
import torch.distributed as dist
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score

from dist_train import Classifier, UserError, load, load_config, register_metric, train
from tests.api.tables import QUICK, loans, quick


def test_rows_of_text_numbers_and_missing_cells() -> None:
    table, risk = loans()
    classifier = quick(epochs=20, batch_size=16, categorical=["branch"]).fit(table, risk)
    probabilities = classifier.predict_proba(table)
    assert classifier.classes_.tolist() == ["high", "low", "medium"]
    assert classifier.feature_names_in_.tolist() == ["income", "purpose", "branch"]
    assert probabilities.shape == (120, 3)
    assert probabilities.dtype == np.float64
    assert probabilities.sum(1) == pytest.approx(np.ones(120))
    assert classifier.score(table, risk) > 0.7
    assert classifier.summary_["test"] is None
    assert classifier.summary_["valid"]["rows"] == 18


def test_pandas_gives_the_bits_of_polars() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    table, risk = loans()
    of_polars = quick().fit(table, risk)
    of_pandas = quick().fit(table.to_pandas(), risk.to_pandas())
    assert of_pandas.summary_["weights_sha256"] == of_polars.summary_["weights_sha256"]
    assert np.array_equal(of_pandas.predict_proba(table.to_pandas()), of_polars.predict_proba(table))
    mixed = table.to_pandas().astype({"purpose": "category"})
    assert np.array_equal(of_pandas.predict_proba(mixed), of_polars.predict_proba(table))


def test_records_and_columns_give_the_bits_of_a_dataframe() -> None:
    table, risk = loans()
    classifier = quick().fit(table.to_dicts(), risk.to_list())
    assert classifier.summary_["weights_sha256"] == quick().fit(table, risk).summary_["weights_sha256"]
    expected = classifier.predict_proba(table)
    assert np.array_equal(classifier.predict_proba(table.to_dict(as_series=False)), expected)
    assert np.array_equal(classifier.predict_proba(table.to_dicts()[:1]), classifier.predict_proba(table[:1]))


@pytest.mark.parametrize(
    "labels",
    [[0, 1], [-1, 7], [False, True], ["bad", "good"], ["10", "9"], [1.0, 2.0], [np.int8(3), np.int8(4)]],
    ids=str,
)
def test_labels_keep_their_type_and_order(labels: list[Any], tmp_path: Path) -> None:
    features = np.linspace(-1, 1, 60)[:, None]
    y = np.array(labels)[(features[:, 0] > 0).astype(int)]
    classifier = quick(epochs=10, batch_size=8).fit(features, y)
    assert classifier.classes_.dtype == y.dtype
    assert classifier.classes_.tolist() == sorted(labels)
    assert classifier.predict(features).dtype == y.dtype
    second = classifier.predict_proba(features)[:, 1]
    assert second[-10:].mean() > second[:10].mean()
    classifier.save(tmp_path / "saved")
    again = Classifier.load(tmp_path / "saved")
    assert again.classes_.dtype == y.dtype
    assert np.array_equal(again.predict_proba(features), classifier.predict_proba(features))


def test_an_array_of_objects_may_hold_text() -> None:
    table, risk = loans()
    rows = table.to_numpy()
    assert rows.dtype == object
    of_rows = quick().fit(rows, risk)
    assert of_rows.n_features_in_ == 3
    assert of_rows.summary_["weights_sha256"] == quick().fit(table, risk).summary_["weights_sha256"]


def test_columns_that_are_codes_are_given_by_position_or_name() -> None:
    table, risk = loans()
    by_name, by_place = (quick(categorical=c).fit(table, risk) for c in (["branch"], [2]))
    assert by_name.summary_["weights_sha256"] == by_place.summary_["weights_sha256"]
    assert by_name.summary_["weights_sha256"] != quick().fit(table, risk).summary_["weights_sha256"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    """A classifier, and its run folder."""
    folder = tmp_path_factory.mktemp("runs") / "loans"
    return quick(run_dir=folder, random_state=3).fit(*loans()), folder


def test_the_run_is_the_one_of_the_command(fitted: tuple[Classifier, Path], tmp_path: Path) -> None:
    classifier, folder = fitted
    again = train(folder / "config.yaml", [f"run.dir={tmp_path}"], verbose=False)
    assert again.summary["weights_sha256"] == classifier.summary_["weights_sha256"]
    assert (folder / "metrics.jsonl").stat().st_size > 0
    assert not (folder / "wandb").exists()


def test_a_run_folder_is_a_trained_model(fitted: tuple[Classifier, Path]) -> None:
    classifier, folder = fitted
    table, risk = loans()
    assert np.array_equal(load(folder).predict_proba(table), classifier.predict_proba(table))
    metrics = load(folder).evaluate("valid")
    assert metrics["loss"] == classifier.summary_["valid"]["loss"]
    assert load(folder / "model").evaluate(data=table.with_columns(risk))["rows"] == 120


def test_saved_and_pickled_classifiers_score_alike(fitted: tuple[Classifier, Path], tmp_path: Path) -> None:
    classifier, _ = fitted
    table, _ = loans()
    expected = classifier.predict_proba(table)
    classifier.save(tmp_path / "saved")
    classifier.save(tmp_path / "saved")  # again
    loaded = Classifier.load(tmp_path / "saved")
    assert loaded.get_params()["epochs"] == 3
    assert loaded.feature_names_in_.tolist() == table.columns
    assert loaded.summary_ == classifier.summary_
    for other in (loaded, pickle.loads(pickle.dumps(classifier)), load(tmp_path / "saved")):
        assert np.array_equal(other.predict_proba(table), expected)


def test_a_predictor_reads_any_table(fitted: tuple[Classifier, Path], tmp_path: Path) -> None:
    _, folder = fitted
    table, risk = loans()
    predictor = load(folder)
    expected = predictor.predict_proba(table)
    table.write_csv(tmp_path / "clients.csv")
    table.write_parquet(tmp_path / "clients.parquet")
    shuffled = table.select("branch", "income", pl.lit("x").alias("more"), "purpose")
    for rows in (
        shuffled,
        table.to_dicts(),
        table.to_dict(),
        str(tmp_path / "clients.csv"),
        tmp_path / "clients.parquet",
    ):
        assert np.array_equal(predictor.predict_proba(rows), expected)
    assert set(predictor.predict(table)) <= set(risk)
    assert predictor.classes_.tolist() == predictor.class_names == ["high", "low", "medium"]
    with pytest.raises(UserError, match="the table: no column 'branch'"):
        predictor.predict_proba(table.drop("branch"))
    with pytest.raises(UserError, match="the table: no column 'risk'"):
        predictor.evaluate(data=table)
    with pytest.raises(UserError, match="a int is not a table"):
        predictor.predict_proba(3)


def test_a_configuration_and_arguments(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("run: {seed: 9}\ndata: {drop: [branch, elsewhere]}\ntrain: {epochs: 1, global_batch_size: 64}\n")
    table, risk = loans()
    without = table.drop("branch")
    of_file = Classifier(file, overrides=QUICK, device="cpu").fit(table, risk)
    assert of_file.summary_["steps"] == 2
    config = load_config(file, [*QUICK, "runtime.device=cpu"])
    assert Classifier(config).fit(without, risk).summary_["weights_sha256"] == of_file.summary_["weights_sha256"]
    assert Classifier(config, epochs=2).fit(table, risk).summary_["steps"] == 4
    assert Classifier(config, epochs=2, overrides=["train.max_steps=3"]).fit(table, risk).summary_["steps"] == 3


def test_a_small_table_gets_small_batches() -> None:
    table, risk = loans()
    assert quick(epochs=2).fit(table, risk).summary_["steps"] == 2 * -(-102 // 16)
    assert quick(epochs=2, batch_size=51).fit(table, risk).summary_["steps"] == 4
    assert quick(epochs=1, batch_size=51, validation_fraction=0.9).fit(table, risk).summary_["steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "train.epochs: must be at least 1"),
        ({"model": "nobody_has_it"}, "model.name"),
        ({"overrides": ["train.epoch=3"]}, "train.epoch"),
        ({"overrides": ["train.loss=nobody_has_it"]}, "there is no loss 'nobody_has_it'; there is cross_entropy"),
        ({"overrides": ["evaluation.metrics=[nobody_has_it]"]}, "there is no metric 'nobody_has_it'"),
        ({"overrides": ["task.name=nobody_has_it"]}, "there is no task 'nobody_has_it'; there is tabular"),
        ({"categorical": ["nothing"]}, "X: no column 'nothing'"),
        ({"categorical": [7]}, "there is no column 7"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ],
    ids=str,
)
def test_mistakes_in_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        quick(**arguments).fit(*loans())
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:5]), "inconsistent numbers of samples"),
        (lambda x, _: (x, None), "requires y"),
        (lambda x, y: (x, ["one"] * len(y)), "only one class"),
        (lambda x, y: (x, [None, *y[1:]]), "the label of row 1 is missing"),
        (lambda x, y: (x, np.linspace(0, 1, len(y))), "continuous"),
        (lambda x, y: (x.with_columns(pl.lit(float("inf")).alias("income")), y), "X: column 'income', data row 1"),
        (lambda x, y: (x.with_columns(pl.lit([1]).alias("purpose")), y), "X: column 'purpose' has type List"),
        (lambda x, y: (x.with_columns(pl.lit("x").alias("Risk")), y), None),
        (lambda x, y: (x, ["1", "1.0"] * (len(y) // 2)), "the same class name"),
    ],
)
def test_mistakes_in_the_rows(change: Any, message: str | None) -> None:
    table, risk = change(*loans())
    if message is None:
        quick().fit(table, risk)
        return
    with pytest.raises(ValueError, match=message):
        quick().fit(table, risk)


def test_weights_of_rows() -> None:
    table, risk = loans()
    plain = quick().fit(table, risk).summary_
    same = quick().fit(table, risk, sample_weight=np.full(120, 2.0)).summary_
    assert same["weights_sha256"] == plain["weights_sha256"]
    weights = np.where(risk == "high", 10.0, 0.1)
    weighted = quick().fit(table, risk, sample_weight=weights)
    assert weighted.predict_proba(table)[:, 0].mean() > quick().fit(table, risk).predict_proba(table)[:, 0].mean()
    assert weighted.summary_["valid"]["rows"] == plain["valid"]["rows"]
    assert weighted.summary_["valid"]["weight"] == pytest.approx(10.0 * 7 + 0.1 * 11, rel=0.3)
    assert weighted.n_features_in_ == table.width


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.arange(119), r"one number for each of the 120 rows, has shape \(119,\)"),
        (np.zeros(120), "the weight of every row is zero"),
        (np.arange(120) - 1.0, "row 1: -1.0 is not a finite number of at least 0"),
        (np.r_[np.ones(119), np.nan], "row 120: nan is not a finite number"),
        (["much"] * 120, "sample_weight: must be numbers"),
    ],
)
def test_mistakes_in_weights_of_rows(weights: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quick().fit(*loans(), sample_weight=weights)


def test_a_classifier_without_fit_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        quick().save(tmp_path / "saved")
    with pytest.raises(UserError, match="there is no saved classifier"):
        Classifier.load(tmp_path)


def test_nothing_of_the_user_is_overwritten(fitted: tuple[Classifier, Path], tmp_path: Path) -> None:
    classifier, folder = fitted
    with pytest.raises(UserError, match="holds something already"):
        quick(run_dir=folder).fit(*loans())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        classifier.save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="no Classifier has saved"):
        Classifier.load(folder / "model")


def test_nothing_is_left_and_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    quick().fit(*loans()).predict(loans()[0])
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    quick(verbose=True).fit(*loans())
    assert "steps" in capfd.readouterr().err


class Kept:
    """What a job must leave as it was."""

    def __init__(self) -> None:
        self.state = {
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
            "python": random.getstate(),
            "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)],
            "logging": (logging.getLogger("dist_train").handlers[:], logging.getLogger("dist_train").level),
            "gradients": torch.is_grad_enabled(),
            "group": dist.is_initialized(),
            "dtype": torch.get_default_dtype(),
        }


@pytest.fixture
def two_threads() -> Any:
    """torch with more threads than the exact mode uses."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_program_around_it_stays_as_it_was() -> None:
    before = Kept().state
    classifier = quick(overrides=["train.virtual_ranks=4"], verbose=True).fit(*loans())
    classifier.predict(loans()[0])
    assert Kept().state == before


@pytest.mark.usefixtures("two_threads")
def test_an_interrupt_ends_it_at_once_and_leaves_all_as_it_was() -> None:
    @register_metric("interrupting")
    def interrupting(*_: Any) -> float:
        raise KeyboardInterrupt

    before = Kept().state
    with pytest.raises(KeyboardInterrupt):
        quick(overrides=["evaluation.metrics=[interrupting]", "train.virtual_ranks=4"]).fit(*loans())
    assert Kept().state == before


def test_it_works_outside_of_the_main_thread(tmp_path: Path) -> None:
    found: list[Any] = []
    data = tmp_path / "loans.parquet"
    table, risk = loans()
    table.with_columns(risk).write_parquet(data)
    settings = [f"data.path={data}", "data.target=risk", f"run.dir={tmp_path}", "wandb.mode=disabled", "train.epochs=1"]

    def work() -> None:
        found.append(quick().fit(table, risk).score(table, risk))
        found.append(train(overrides=[*QUICK, *settings], verbose=False).finished)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 2


def test_cross_validation() -> None:
    rng = np.random.default_rng(0)
    features: npt.NDArray[np.float64] = rng.normal(size=(90, 2))
    scores = cross_val_score(quick(epochs=12), features, features[:, 0] > 0, cv=3, scoring="neg_log_loss")
    assert (scores > -0.6).all()
