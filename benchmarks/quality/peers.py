"""What others reach: one peer on one table with one seed, as a process of its own.

python -m benchmarks.quality.peers lightgbm table.parquet --seed 0

prints one JSON line. A peer sees the training rows, chooses by the validation rows, and is told nothing of the test
rows: their log loss is computed at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SETTINGS = 20  # random settings of a tuned peer
_SMALLEST = 1e-15


@dataclass
class Rows:
    """A split: columns, numbers with NaN where missing, text as pandas categories; class indices."""

    x: pd.DataFrame
    y: Any


@dataclass
class Problem:
    """A table as its peers get it."""

    train: Rows
    valid: Rows
    test: Rows
    num_classes: int
    seed: int

    @property
    def categorical(self) -> list[str]:
        """Names of the columns of text."""
        return [name for name in self.train.x if isinstance(self.train.x[name].dtype, pd.CategoricalDtype)]


Predict = Callable[[pd.DataFrame], Any]


def read(file: Path, seed: int) -> Problem:
    """The splits of a table; a category is one that occurs in the training rows."""
    frame = pd.read_parquet(file)
    splits = {name: rows.drop(columns=["split", "target"]) for name, rows in frame.groupby("split")}
    labels = {name: rows["target"] for name, rows in frame.groupby("split")}
    classes = sorted(labels["train"].unique())
    codes = {name: np.array([classes.index(v) for v in values]) for name, values in labels.items()}
    for name in splits["train"]:
        if not pd.api.types.is_numeric_dtype(splits["train"][name]):
            known = sorted(splits["train"][name].dropna().unique())
            for rows in splits.values():
                rows[name] = pd.Categorical(rows[name].where(rows[name].isin(known)), categories=known)
    found = {name: Rows(splits[name], codes[name]) for name in ("train", "valid", "test")}
    return Problem(**found, num_classes=len(classes), seed=seed)


def log_loss(probabilities: Any, targets: Any) -> float:
    """Mean negative logarithm of the probability of the true class."""
    chosen = np.asarray(probabilities, dtype=np.float64)[np.arange(len(targets)), targets]
    return float(-np.log(np.clip(chosen, _SMALLEST, 1)).mean())


def lightgbm(problem: Problem, **parameters: Any) -> Predict:
    """LightGBM as it comes."""
    from lightgbm import LGBMClassifier

    model = LGBMClassifier(random_state=problem.seed, n_jobs=1, verbose=-1, **parameters)
    model.fit(problem.train.x, problem.train.y)
    return model.predict_proba  # type: ignore[no-any-return]


def lightgbm_tuned(problem: Problem) -> Predict:
    """LightGBM: the best of 20 random settings by the log loss of the validation rows, each with early stopping."""
    from lightgbm import LGBMClassifier, early_stopping

    rng, best = np.random.default_rng(problem.seed), (np.inf, None)
    for _ in range(SETTINGS):
        model = LGBMClassifier(
            random_state=problem.seed,
            n_jobs=1,
            verbose=-1,
            n_estimators=2000,
            learning_rate=float(np.exp(rng.uniform(np.log(0.02), np.log(0.2)))),
            num_leaves=int(np.exp(rng.uniform(np.log(4), np.log(128)))),
            min_child_samples=int(np.exp(rng.uniform(np.log(3), np.log(200)))),
            subsample=float(rng.uniform(0.5, 1)),
            subsample_freq=1,
            colsample_bytree=float(rng.uniform(0.4, 1)),
            reg_lambda=float(np.exp(rng.uniform(np.log(1e-3), np.log(10)))),
        )
        stop = early_stopping(50, verbose=False)
        valid = [(problem.valid.x, problem.valid.y)]
        model.fit(problem.train.x, problem.train.y, eval_set=valid, callbacks=[stop])
        loss = log_loss(model.predict_proba(problem.valid.x), problem.valid.y)
        if loss < best[0]:
            best = (loss, model)
    return best[1].predict_proba  # type: ignore[union-attr]


def xgboost(problem: Problem) -> Predict:
    """XGBoost as it comes."""
    from xgboost import XGBClassifier

    model = XGBClassifier(random_state=problem.seed, n_jobs=1, enable_categorical=True)
    model.fit(problem.train.x, problem.train.y)
    return model.predict_proba  # type: ignore[no-any-return]


def catboost(problem: Problem) -> Predict:
    """CatBoost as it comes."""
    from catboost import CatBoostClassifier

    def text(x: pd.DataFrame) -> pd.DataFrame:
        return x.assign(**{name: x[name].astype(object).fillna("missing") for name in problem.categorical})

    model = CatBoostClassifier(
        random_seed=problem.seed, thread_count=1, verbose=False, allow_writing_files=False,
        loss_function="MultiClass" if problem.num_classes > 2 else "Logloss", cat_features=problem.categorical,
    )  # fmt: skip
    model.fit(text(problem.train.x), problem.train.y)
    return lambda x: model.predict_proba(text(x))


def logistic_regression(problem: Problem) -> Predict:
    """scikit-learn's, on standardised numbers (missing: the median, and a flag) and one-hot categories."""
    from sklearn.linear_model import LogisticRegression

    encode = _dense(problem)
    model = LogisticRegression(max_iter=1000).fit(encode(problem.train.x), problem.train.y)
    return lambda x: model.predict_proba(encode(x))


def tutorial_loop(problem: Problem) -> Predict:
    """The FinancialClassifier in a plain loop: 20 epochs, batch 32, AdamW 1e-3, cosine; the best epoch is kept."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset

    from dist_train.models.financial_classifier import FinancialClassifier

    torch.manual_seed(problem.seed)
    torch.set_num_threads(1)
    encode = _dense(problem)
    x, y = torch.from_numpy(encode(problem.train.x)), torch.from_numpy(problem.train.y)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, drop_last=len(y) % 32 == 1)
    model = FinancialClassifier(x.shape[1], 256, problem.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def predict(rows: pd.DataFrame) -> Any:
        model.eval()
        with torch.no_grad():
            return model(torch.from_numpy(encode(rows))).softmax(1).numpy()

    best, kept = np.inf, {}
    for _ in range(20):
        model.train()
        for features, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(features), targets).backward()
            optimizer.step()
        scheduler.step()
        loss = log_loss(predict(problem.valid.x), problem.valid.y)
        if loss < best:
            best, kept = loss, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(kept)
    return predict


def realmlp(problem: Problem) -> Predict:
    """pytabkit's RealMLP with its tuned defaults."""
    from pytabkit import RealMLP_TD_Classifier

    return _of_pytabkit(problem, RealMLP_TD_Classifier(random_state=problem.seed, device="cpu", n_threads=1))


def tabm(problem: Problem) -> Predict:
    """pytabkit's TabM with its defaults."""
    from pytabkit import TabM_D_Classifier

    return _of_pytabkit(problem, TabM_D_Classifier(random_state=problem.seed, device="cpu", n_threads=1))


def _of_pytabkit(problem: Problem, model: Any) -> Predict:
    rows = {"X_val": problem.valid.x, "y_val": problem.valid.y, "cat_col_names": problem.categorical}
    model.fit(problem.train.x, problem.train.y, **rows)
    return model.predict_proba  # type: ignore[no-any-return]


def _dense(problem: Problem) -> Callable[[pd.DataFrame], Any]:
    """Standardised numbers and one-hot categories as float32 rows."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = [name for name in problem.train.x if name not in problem.categorical]
    scale = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    one_hot = OneHotEncoder(handle_unknown="ignore", max_categories=256, sparse_output=False)
    columns = ColumnTransformer([("numbers", scale, numbers), ("categories", one_hot, problem.categorical)])
    columns.fit(problem.train.x)
    return lambda x: columns.transform(x).astype(np.float32)


PEERS: dict[str, tuple[str, Callable[[Problem], Predict]]] = {
    "lightgbm": ("lightgbm", lightgbm),
    "lightgbm_tuned": ("lightgbm", lightgbm_tuned),
    "xgboost": ("xgboost", xgboost),
    "catboost": ("catboost", catboost),
    "logistic_regression": ("sklearn", logistic_regression),
    "tutorial_loop": ("torch", tutorial_loop),
    "realmlp": ("pytabkit", realmlp),
    "tabm_pytabkit": ("pytabkit", tabm),
}
"""Name -> the package that it needs, and what makes its predictions."""


def missing_package(name: str) -> str | None:
    """The package that a peer needs and that is not installed here."""
    package = PEERS[name][0]
    return None if find_spec(package) else package


def main() -> None:
    """Fit, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    problem = read(arguments.table, arguments.seed)
    predict = PEERS[arguments.peer][1](problem)
    scores = {
        name: log_loss(predict(rows.x), rows.y) for name, rows in (("valid", problem.valid), ("test", problem.test))
    }
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
