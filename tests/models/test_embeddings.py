"""One-hot rows and learned embeddings of category codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.data.encoding.spec import FIRST_CATEGORY, CategoricalColumn, FeatureSpec
from dist_train.models.embeddings import Embedded, OneHot, TabularInputs
from tests.models.specs import make_inputs, make_spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("codes", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_one_hot_rows_are_those_of_torch(codes: torch.dtype, dtype: torch.dtype) -> None:
    spec = make_spec(0, [4, 2, 7])
    inputs = make_inputs(spec, 50)
    expected = torch.cat([F.one_hot(inputs.codes[:, i].long(), size) for i, size in enumerate(spec.category_sizes)], 1)
    made = OneHot(spec).to(dtype)(inputs.codes.to(codes))
    assert made.dtype == dtype
    assert torch.equal(made, expected.to(dtype))


def test_codes_that_did_not_occur_in_training_are_zeros() -> None:
    column = CategoricalColumn(name="x", categories=("a", "b"), seen_in_training=(False, True, True, False))
    spec = FeatureSpec(numeric=(), categorical=(column, column), class_names=("n", "y"))
    made = OneHot(spec)(torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8))
    assert made.tolist() == [[0, 0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("sizes", [[], [4, 6]])
@pytest.mark.parametrize("num_flags", [0, 2])
@pytest.mark.parametrize("num_numeric", [0, 3])
def test_numbers_flags_and_one_hot_categories_are_side_by_side(
    num_numeric: int, num_flags: int, sizes: list[int]
) -> None:
    spec = make_spec(num_numeric, sizes, num_flags=num_flags)
    inputs, module = make_inputs(spec, 30, dtype=torch.float64), TabularInputs(spec).double()
    parts = [inputs.numeric, inputs.flags.double()]
    parts += [OneHot(spec).double()(inputs.codes)] if sizes else []
    made = module(*inputs)
    assert torch.equal(made, torch.cat(parts, 1))
    assert made.shape == (30, module.width)
    assert module(*(x[:0] for x in inputs)).shape == (0, module.width)


def test_numbers_alone_pass_as_they_are() -> None:
    inputs = make_inputs(make_spec(5), 8)
    assert TabularInputs(make_spec(5))(*inputs) is inputs.numeric


def test_inputs_leave_nothing_in_the_state_dict() -> None:
    assert list(TabularInputs(make_spec(2, [4, 6], num_flags=1)).state_dict()) == []


def test_embeddings_are_joined_to_the_features_in_order() -> None:
    spec = make_spec(2, [5, 4], num_flags=1)
    torch.manual_seed(0)
    model = Embedded(spec, 3, lambda width: nn.Linear(width, 2))
    inputs = make_inputs(spec, 20)
    first, second = (e.get_parameter("weight") for e in model.embeddings)
    codes = inputs.codes.long()
    joined = torch.cat([inputs.numeric, inputs.flags.float(), first[codes[:, 0]], second[codes[:, 1]]], 1)
    torch.testing.assert_close(model(*inputs), model.classifier(joined), rtol=0, atol=0)
    for table in (first, second):
        assert table[:FIRST_CATEGORY].eq(0).all()
        assert table[FIRST_CATEGORY:].ne(0).all()
    assert model(*(x[:0] for x in inputs)).shape == (0, 2)
    assert list(model.state_dict()) == [
        "embeddings.0.weight",
        "embeddings.1.weight",
        "classifier.weight",
        "classifier.bias",
    ]
