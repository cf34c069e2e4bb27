"""What somebody would use instead, on the same splits: class frequencies, logistic regression, LightGBM."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dist_train.risk.stability import is_number, most_frequent, numbers_of

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MOST_CATEGORIES = 100
MOST_ROWS = 200_000


def predictions_beside(
    tables: dict[str, pl.DataFrame],
    targets: dict[str, Integers],
    weights: dict[str, Floats],
    num_classes: int,
    *,
    seed: int,
) -> tuple[dict[str, Floats], dict[str, str]]:
    """Name -> probabilities of the test rows, (rows, classes), of models that saw the training rows; what is left out.

    Columns are the features. Of more than 200,000 training rows the first so many are taken. LightGBM stops by the
    validation rows.
    """
    rows = {split: slice(0, MOST_ROWS if split == "train" else None) for split in tables}
    y = {split: targets[split][rows[split]] for split in tables}
    w = {split: weights[split][rows[split]] for split in tables}
    frequencies = np.bincount(y["train"], w["train"], minlength=num_classes) / w["train"].sum()
    found = {"class frequencies": np.tile(frequencies, (len(y["test"]), 1))}
    missing: dict[str, str] = {}
    columns = [n for n in tables["train"].columns if is_number(tables["train"][n]) or _few(tables["train"][n])]
    if not columns or len(np.unique(y["train"])) < 2:
        return found, {"logistic regression": "no columns of numbers or categories", "LightGBM": "the same"}
    encoded, categorical = _encoded({split: table[rows[split]] for split, table in tables.items()}, columns)
    makers: dict[str, Callable[[], Floats]] = {
        "logistic regression": lambda: _logistic(encoded, y, w, categorical, seed),
    }
    if find_spec("lightgbm"):
        makers["LightGBM"] = lambda: _lightgbm(encoded, y, w, categorical, seed)
    else:
        missing["LightGBM"] = "is not installed"
    for name, make in makers.items():
        found[name] = _of_all_classes(make(), np.unique(y["train"]), num_classes)
    return found, missing


def _few(column: pl.Series) -> bool:
    return column.n_unique() <= 10 * MOST_CATEGORIES


def _of_all_classes(predicted: Floats, present: Integers, num_classes: int) -> Floats:
    full = np.zeros((len(predicted), num_classes))
    full[:, present] = predicted
    return full


def _encoded(tables: dict[str, pl.DataFrame], columns: list[str]) -> tuple[dict[str, Floats], list[int]]:
    """Numbers, NaN where missing; of categories the rank by frequency in the training rows, NaN of others."""
    made: dict[str, list[Floats]] = {split: [] for split in tables}
    categorical = []
    for index, name in enumerate(columns):
        train = tables["train"][name]
        if is_number(train):
            for split, table in tables.items():
                made[split].append(numbers_of(table[name]))
            continue
        categorical.append(index)
        place = {text: float(i) for i, text in enumerate(most_frequent(train, MOST_CATEGORIES))}
        for split, table in tables.items():
            made[split].append(np.array([place.get(t, np.nan) for t in table[name].cast(pl.String).to_list()]))
    return {split: np.stack(parts, axis=1) for split, parts in made.items()}, categorical


def _logistic(
    x: dict[str, Floats], y: dict[str, Integers], w: dict[str, Floats], categorical: list[int], seed: int
) -> Floats:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numeric = [i for i in range(x["train"].shape[1]) if i not in categorical]
    impute = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    of_numbers = ("numbers", make_pipeline(impute, StandardScaler()), numeric)
    of_categories = ("categories", OneHotEncoder(handle_unknown="ignore"), categorical)
    encode = ColumnTransformer([of_numbers, of_categories])
    inputs = encode.fit_transform(x["train"])
    model = LogisticRegression(max_iter=300, random_state=seed % 2**31).fit(inputs, y["train"], w["train"])
    return np.asarray(model.predict_proba(encode.transform(x["test"])), dtype=np.float64)


def _lightgbm(
    x: dict[str, Floats], y: dict[str, Integers], w: dict[str, Floats], categorical: list[int], seed: int
) -> Floats:
    import lightgbm as lgb

    present, places = np.unique(y["train"], return_inverse=True)
    options: dict[str, Any] = {
        "objective": "multiclass",
        "num_class": len(present),
        "learning_rate": 0.05,
        "seed": seed % 2**31,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    train = lgb.Dataset(x["train"], places, weight=w["train"], categorical_feature=categorical)
    known = np.isin(y["valid"], present)
    stops: dict[str, Any] = {}
    if w["valid"][known].sum():
        targets = np.searchsorted(present, y["valid"][known])
        valid = lgb.Dataset(x["valid"][known], targets, weight=w["valid"][known], reference=train)
        stops = {"valid_sets": [valid], "callbacks": [lgb.early_stopping(30, verbose=False)]}
    model = lgb.train(options, train, num_boost_round=500, **stops)
    return np.asarray(model.predict(x["test"]), dtype=np.float64)


def summary_of(predicted: Floats, targets: Integers, weights: Floats, positive: int) -> dict[str, Any]:
    """Log loss over all classes, and AUROC and average precision of the positive one."""
    from dist_train.risk.binary import binary_metrics

    losses = log_losses(predicted, targets)
    of_class = binary_metrics(predicted[:, positive], targets == positive, weights)
    return {
        "log_loss": float(np.average(losses, weights=weights)),
        **{name: of_class[name] for name in ("auroc", "average_precision", "brier")},
    }


def log_losses(predicted: Floats, targets: Integers) -> Floats:
    """The log loss of each row, scikit-learn's: probabilities are clipped to the smallest difference from 0 and 1."""
    eps = np.finfo(np.float64).eps
    own = np.clip(predicted[np.arange(len(targets)), targets], eps, 1 - eps)
    return np.asarray(-np.log(own))
