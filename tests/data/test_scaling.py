"""The quantile transform against scikit-learn's."""

from __future__ import annotations

import json
import warnings

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import norm
from sklearn.preprocessing import QuantileTransformer

from dist_train.data.encoding.encoder import Encoder, fit_spec
from dist_train.data.encoding.scaling import LARGEST_NORMAL, scaled
from dist_train.data.encoding.spec import NUM_TRANSFORM_QUANTILES, FeatureSpec, NumericColumn
from dist_train.data.tables.table import ColumnKinds
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from tests.ranks import on_ranks

ROWS = 2000
RANDOM = np.random.default_rng(0)
COLUMNS = {
    "normal": RANDOM.standard_normal(ROWS),
    "heavy tails": RANDOM.standard_cauchy(ROWS) ** 3,
    "few numbers": RANDOM.integers(0, 7, ROWS).astype(float),
    "mostly one number": np.where(RANDOM.random(ROWS) < 0.7, 3.0, RANDOM.standard_normal(ROWS) + 3),
    "two numbers": (RANDOM.random(ROWS) < 0.1).astype(float),
}


def fit(columns: dict[str, np.ndarray], collectives: Collectives | None = None) -> FeatureSpec:
    collectives = collectives or Collectives(World())
    frame = pl.DataFrame(columns)[collectives.rank :: collectives.size]
    return fit_spec(
        lambda names: frame.select(names).iter_slices(300),
        ColumnKinds(numeric=list(columns), categorical=[]),
        ["a", "b"],
        collectives,
        max_categories=2,
        source="t",
        numeric_transform="quantile",
    )


def fitted(values: np.ndarray) -> NumericColumn:
    return fit({"x": values}).numeric[0]


@pytest.mark.parametrize("kind", COLUMNS)
def test_it_is_scikit_learns(kind: str) -> None:
    values = COLUMNS[kind]
    theirs = QuantileTransformer(n_quantiles=NUM_TRANSFORM_QUANTILES, output_distribution="normal", subsample=None).fit(
        values[:, None]
    )
    others = np.concatenate([values, np.linspace(values.min() - 1, values.max() + 1, 999)])
    ours = scaled(torch.from_numpy(others), fitted(values)).numpy()
    np.testing.assert_allclose(ours, theirs.transform(others[:, None])[:, 0], rtol=0, atol=1e-6)


def test_the_largest_value_is_that_of_scikit_learn() -> None:
    assert norm.ppf(1 - (1e-7 - np.spacing(1))) == pytest.approx(LARGEST_NORMAL, abs=1e-9)


def test_a_constant_and_an_empty_column_become_zeros_and_missing_cells_the_median() -> None:
    spec = fit({"same": np.full(9, 4.0), "none": np.full(9, np.nan), "some": np.array([1, 2, 3, 4, np.nan] * 2)[:9]})
    frame = pl.DataFrame({"same": [4.0, 5.0, None], "none": [None, 1.0, 2.0], "some": [2.5, None, 99.0]})
    numeric = Encoder(spec).to_arrays(frame, "t").numeric
    assert numeric[:, :2].eq(0).all()
    assert numeric[:, 2].tolist() == [0, 0, pytest.approx(LARGEST_NORMAL)]


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e37])
def test_numbers_of_any_size_are_transformed_alike(size: float) -> None:
    values = RANDOM.standard_normal(500)
    one, other = (scaled(torch.from_numpy(values * s), fitted(values * s)) for s in (1.0, size))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_it_never_falls_where_numbers_rise_and_rows_stand_for_themselves() -> None:
    for values in COLUMNS.values():
        column = fitted(values)
        rising = torch.from_numpy(np.sort(np.concatenate([values, values + 1e-9, [-3e38, 3e38]])))
        together = scaled(rising, column)
        assert (together.diff() >= 0).all()
        assert torch.equal(together[:50], torch.cat([scaled(x, column) for x in rising[:50].split(1)]))


def spec_on_rank(collectives: Collectives) -> str:
    return json.dumps(fit(COLUMNS, collectives).to_json())


def test_it_is_the_same_for_every_world_size_and_through_json() -> None:
    alone = fit(COLUMNS)
    assert set(on_ranks(3, spec_on_rank)) == {json.dumps(alone.to_json())}
    assert FeatureSpec.from_json(json.loads(json.dumps(alone.to_json()))) == alone
    assert len(json.dumps(alone.to_json())) / len(COLUMNS) < 7000  # bytes a column


def test_a_spec_of_before_is_robust_and_another_transform_is_another_encoding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = fit({"x": COLUMNS["normal"]})
    content = spec.to_json()
    del content["numeric"][0]["transform"]
    before = FeatureSpec.from_json(content)
    assert before.numeric[0].transform == "robust"
    assert not before.matches(spec)
    content["numeric"][0]["quantiles"] = []
    assert not FeatureSpec.from_json(content).matches(spec)
