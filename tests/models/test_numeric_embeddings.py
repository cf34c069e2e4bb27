"""Numbers as vectors: knots in encoded units, and what each kind computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_train.config.families import FeatureKeys
from dist_train.data.encoding.scaling import scaled
from dist_train.data.encoding.spec import NUM_QUANTILES, FeatureSpec, NumericColumn
from dist_train.models.numeric_embeddings import NARROWEST_BIN, NumericEmbeddings, bin_edges
from tests.models.specs import make_inputs, make_spec


def column_of(values: np.ndarray) -> NumericColumn:
    quantiles = tuple(float(q) for q in np.quantile(values, np.linspace(0, 1, NUM_QUANTILES)))
    spread = quantiles[24] - quantiles[8] or (quantiles[-1] - quantiles[0]) / 2
    return NumericColumn(
        name="x", median=quantiles[16], scale=1 / spread if spread else 0.0, has_missing_flag=False, quantiles=quantiles
    )


@pytest.mark.parametrize("num_bins", [1, 4, 16, 32, 5])
def test_knots_are_the_encoded_quantiles_of_the_training_rows(num_bins: int) -> None:
    values = np.random.default_rng(0).standard_normal(3201)  # each 33rd quantile is one of the values
    column = column_of(values)
    edges = bin_edges(column, num_bins)
    assert edges.shape == (num_bins + 1,)
    encoded = scaled(torch.from_numpy(values), column)
    assert edges[0] == encoded.min().float()
    assert edges[-1] == encoded.max().float()
    if 32 % num_bins == 0:
        shares = [float((encoded <= edge).double().mean()) for edge in edges.double() + 1e-6]
        np.testing.assert_allclose(shares, np.linspace(0, 1, num_bins + 1), atol=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(50),
        np.repeat([0.0, 1.0], [10, 40]),
        np.repeat([0.0, 1.0, 7.0], [90, 5, 5]),
        np.concatenate([np.zeros(99), [1e30]]),
        np.random.default_rng(1).standard_cauchy(200) ** 5,
        np.arange(3) * 1e-40,
    ],
    ids=["one number", "two numbers", "mostly one number", "an outlier", "heavy tails", "tiny"],
)
def test_columns_of_every_shape_have_increasing_knots_and_bounded_values(values: np.ndarray) -> None:
    column = column_of(values)
    edges = bin_edges(column, 16)
    assert len(edges) >= 2
    assert edges.diff().min() >= NARROWEST_BIN * 0.99
    spec = FeatureSpec(numeric=(column, *make_spec(1).numeric), categorical=(), class_names=("n", "y"))
    torch.manual_seed(0)
    module = NumericEmbeddings(spec, FeatureKeys())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    encoded = scaled(torch.from_numpy(np.concatenate([values, [-3e38, 3e38]])), column).float()
    assert module(torch.stack([encoded, encoded], 1)).abs().max() < 6 / NARROWEST_BIN * 16


def test_a_spec_without_quantiles_has_even_knots() -> None:
    column = replace(make_spec(1).numeric[0], quantiles=())
    assert bin_edges(column, 3).tolist() == [-3, -1, 1, 3]


def test_a_piecewise_linear_embedding_is_linear_between_its_knots_and_bends_at_them() -> None:
    spec = make_spec(1)
    torch.manual_seed(0)
    module = NumericEmbeddings(spec, FeatureKeys(numeric_bins=4, numeric_width=3)).double()
    edges = bin_edges(spec.numeric[0], 4)
    x = torch.linspace(-2.4, 2.4, 97, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        at_first = module(x)
        torch.nn.init.normal_(module.embeddings.linear.weight)
        values = module(x)
    assert at_first.diff(n=2, dim=0).abs().max() < 1e-9  # linear when training begins
    bends = values.diff(n=2, dim=0).abs().amax(1) > 1e-6
    near = ((x[1:-1] - edges[1:-1].double()).abs() < 0.06).any(1)
    assert bends.any()
    assert near[bends].all()


@pytest.mark.parametrize("kind", ["none", "piecewise_linear", "periodic"])
def test_every_kind_hands_on_the_width_that_it_states(kind: str) -> None:
    keys = FeatureKeys(numeric_embedding=kind, numeric_width=5)  # type: ignore[arg-type]
    for spec in (make_spec(3), make_spec(0, [4])):
        numeric = make_inputs(spec, 7).numeric
        module = NumericEmbeddings(spec, keys)
        assert module(numeric).shape == (7, module.width)
        assert sum(module.widths) == module.width == spec.num_numeric * (1 if kind == "none" else 5)
        assert (module(numeric) is numeric) == (kind == "none" or not spec.num_numeric)
