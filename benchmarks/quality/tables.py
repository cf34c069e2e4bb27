"""The tables of the leaderboard: the built-in one, those that scikit-learn ships, and generated ones.

Each has a column `target` and a column `split` that says train (60 %), valid (20 %) or test (20 %). Everything is a
function of the table's name, so that everybody gets the same rows. None of the generators was changed after a model had
been tried on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
import polars as pl

Array = npt.NDArray[np.float64]
BUILT_IN = "credit_card_risk"


def write(name: str, folder: Path) -> Path:
    """The table as a Parquet file in `folder`; one that is there is taken as it is."""
    file = folder / f"{name}.parquet"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        frame = TABLES[name]()
        if "split" not in frame.columns:
            frame = frame.with_columns(_split(frame["target"], _generator(name, "split")))
        frame.write_parquet(file)
    return file


def _credit_card_risk() -> pl.DataFrame:
    import dist_train

    folder = Path(dist_train.__file__).parent / "data" / "datasets"
    return pl.read_parquet(folder / f"{BUILT_IN}.parquet").rename({"risk_tier": "target"})


def _of_sklearn(name: str) -> Callable[[], pl.DataFrame]:
    def make() -> pl.DataFrame:
        from sklearn import datasets

        found = getattr(datasets, f"load_{name}")()
        columns = {f"x{i}": column for i, column in enumerate(np.asarray(found.data, dtype=np.float64).T)}
        target = np.asarray(found.target)
        if name == "diabetes":  # a regression: thirds of its target are the classes
            target = np.searchsorted(np.quantile(target, [1 / 3, 2 / 3]), target)
        return pl.DataFrame(columns).with_columns(pl.Series("target", [f"c{label}" for label in target.tolist()]))

    return make


def _small() -> pl.DataFrame:
    """500 rows, 10 numeric columns, 2 classes."""
    rng = _generator("small")
    x = rng.normal(size=(500, 10))
    return _frame(x, {}, _draw(rng, _scores(rng, x, 2, trees=10, scale=1.5)))


def _ten_classes() -> pl.DataFrame:
    """20,000 rows, 16 correlated numeric columns, 10 classes."""
    rng = _generator("ten_classes")
    x = rng.normal(size=(20_000, 16)) @ (np.eye(16) + 0.4 * rng.normal(size=(16, 16)))
    return _frame(x, {}, _draw(rng, _scores(rng, x, 10, trees=60, scale=2.0)))


def _all_categorical() -> pl.DataFrame:
    """20,000 rows, 12 columns of 2 to 60 levels with effects of their own and in pairs, 4 classes."""
    rng = _generator("all_categorical")
    levels = [2, 2, 3, 4, 5, 6, 8, 10, 15, 20, 40, 60]
    codes = np.stack([_zipf(rng, count, 20_000) for count in levels], axis=1)
    scores = sum(rng.normal(size=(count, 4))[codes[:, i]] * 0.5 for i, count in enumerate(levels))
    for one, two in ((0, 5), (2, 6), (3, 4), (1, 7)):
        scores = scores + rng.normal(size=(levels[one], levels[two], 4))[codes[:, one], codes[:, two]] * 0.7
    return _frame(np.empty((20_000, 0)), {f"k{i}": codes[:, i] for i in range(len(levels))}, _draw(rng, scores))


def _heavy_tails() -> pl.DataFrame:
    """20,000 rows, 15 columns: Cauchy, log-normal and Pareto amounts, in units from 1e-6 to 1e6; 2 classes."""
    rng = _generator("heavy_tails")
    z = rng.normal(size=(20_000, 15))
    u = (np.argsort(np.argsort(z, axis=0), axis=0) + 0.5) / len(z)
    x = np.concatenate([np.tan(np.pi * (u[:, :5] - 0.5)), np.exp(2 * z[:, 5:10]), (1 - u[:, 10:]) ** -1.2], axis=1)
    return _frame(x * 10.0 ** rng.integers(-6, 7, size=15), {}, _draw(rng, _scores(rng, z, 2, trees=40, scale=1.5)))


def _missing() -> pl.DataFrame:
    """15,000 rows, 20 numeric columns, 30 % of the cells missing, half of them for a reason; 3 classes."""
    rng = _generator("missing")
    x = rng.normal(size=(15_000, 20))
    target = _draw(rng, _scores(rng, x, 3, trees=40, scale=2.0))
    hidden = rng.random(x.shape) < np.where(np.arange(20) < 10, 0.3, 0.6 / (1 + np.exp(-2 * x)))
    return _frame(np.where(hidden, np.nan, x), {}, target)


def _rare() -> pl.DataFrame:
    """100,000 rows, 12 numeric and 3 categorical columns, 1 % positives."""
    rng = _generator("rare")
    x = rng.normal(size=(100_000, 12))
    codes = {f"k{i}": _zipf(rng, count, len(x)) for i, count in enumerate((4, 12, 30))}
    scores = _scores(rng, x, 1, trees=40, scale=1.2)[:, 0]
    scores = scores + sum(rng.normal(size=61)[codes[name]] * 0.5 for name in codes)
    shift = np.quantile(scores - rng.logistic(size=len(x)), 0.99)
    return _frame(x, codes, _draw(rng, np.stack([np.zeros(len(x)), scores - shift], axis=1)))


def _wide() -> pl.DataFrame:
    """40,000 rows, 120 numeric columns with 10 % missing cells, and a column of 5,000 levels; 2 classes."""
    rng = _generator("wide")
    factors = rng.normal(size=(40_000, 12))
    x = factors @ rng.normal(size=(12, 120)) * 0.5 + rng.normal(size=(40_000, 120))
    codes = _zipf(rng, 5000, len(x))
    scores = _scores(rng, factors, 2, trees=40, scale=1.2) + _scores(rng, x[:, :20], 2, trees=20, scale=0.6)
    scores[:, 1] += rng.normal(size=5000)[codes]
    return _frame(np.where(rng.random(x.shape) < 0.1, np.nan, x), {"k0": codes}, _draw(rng, scores))


def _large() -> pl.DataFrame:
    """300,000 rows, 20 numeric and 4 categorical columns, 2 classes."""
    rng = _generator("large")
    x = rng.normal(size=(300_000, 20))
    codes = {f"k{i}": _zipf(rng, count, len(x)) for i, count in enumerate((3, 8, 25, 100))}
    scores = _scores(rng, x, 2, trees=80, scale=1.5)
    scores[:, 1] += sum(rng.normal(size=100)[codes[name]] * 0.4 for name in codes)
    return _frame(x, codes, _draw(rng, scores))


TABLES: dict[str, Callable[[], pl.DataFrame]] = {
    BUILT_IN: _credit_card_risk,
    "breast_cancer": _of_sklearn("breast_cancer"),
    "diabetes": _of_sklearn("diabetes"),
    "digits": _of_sklearn("digits"),
    "wine": _of_sklearn("wine"),
    "small": _small,
    "ten_classes": _ten_classes,
    "all_categorical": _all_categorical,
    "heavy_tails": _heavy_tails,
    "missing": _missing,
    "rare": _rare,
    "wide": _wide,
    "large": _large,
}
"""Name -> maker of the table, the built-in one first."""


def _generator(name: str, purpose: str = "rows") -> np.random.Generator:
    return np.random.default_rng([crc32(name.encode()), crc32(purpose.encode())])


def _scores(rng: np.random.Generator, x: Array, num_classes: int, *, trees: int, scale: float) -> Array:
    """Log odds of the classes: a linear part, smooth functions of single columns and of pairs, and small trees.

    Each part has the same standard deviation, and their sum has `scale`.
    """
    z = (x - x.mean(0)) / x.std(0)
    columns = z.shape[1]
    linear = z @ rng.normal(size=(columns, num_classes))
    frequency = rng.uniform(0.5, 2.0, size=columns)
    smooth = np.sin(z * frequency + rng.uniform(0, 6, size=columns)) @ rng.normal(size=(columns, num_classes))
    pairs, forest = np.zeros_like(linear), np.zeros_like(linear)
    for _ in range(max(2, columns // 2)):
        one, two = rng.choice(columns, 2, replace=False)
        pairs += np.tanh(z[:, one] * z[:, two])[:, None] * rng.normal(size=num_classes)
    for _ in range(trees):
        chosen, cuts = rng.choice(columns, 3), rng.normal(size=3) * 0.8
        leaf = ((z[:, chosen] > cuts) * np.array([1, 2, 4])).sum(1)
        forest += rng.normal(size=(8, num_classes))[leaf]
    parts = [part / part.std() for part in (linear, smooth, pairs, forest)]
    total = np.sum(parts, axis=0)
    return np.asarray(total / total.std() * scale)


def _draw(rng: np.random.Generator, scores: Array) -> list[str]:
    """A class of each row, with the probabilities of a softmax over the scores."""
    return [f"c{label}" for label in (scores + rng.gumbel(size=scores.shape)).argmax(1).tolist()]


def _zipf(rng: np.random.Generator, count: int, rows: int) -> npt.NDArray[np.int64]:
    shares = 1 / (np.arange(count) + 3.0)
    return rng.choice(count, size=rows, p=shares / shares.sum())


def _frame(x: Array, codes: dict[str, npt.NDArray[np.int64]], target: list[str]) -> pl.DataFrame:
    columns = {f"x{i}": pl.Series(x[:, i]).fill_nan(None) for i in range(x.shape[1])}
    words = {name: pl.Series([f"v{code}" for code in values.tolist()]) for name, values in codes.items()}
    return pl.DataFrame(columns | words | {"target": pl.Series(target)})


def _split(target: pl.Series, rng: np.random.Generator) -> pl.Series:
    """60, 20 and 20 % of each class, at random."""
    labels = target.to_numpy()
    split = np.empty(len(labels), dtype=object)
    for label in sorted(set(labels.tolist())):
        rows = rng.permutation(np.flatnonzero(labels == label))
        first, second = round(len(rows) * 0.6), round(len(rows) * 0.8)
        split[rows[:first]], split[rows[first:second]], split[rows[second:]] = "train", "valid", "test"
    return pl.Series("split", split.tolist())
