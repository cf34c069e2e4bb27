"""TabM against the authors' whole model, and what of it is decayed."""

from __future__ import annotations

import pytest
import rtdl_num_embeddings as rtdl
import tabm
import torch

from dist_train.config.families import TabMConfig
from dist_train.config.load import load_config
from dist_train.errors import UserError
from dist_train.execution.optimizer import undecayed_parameters
from dist_train.models.numeric_embeddings import bin_edges
from dist_train.models.registry import build_model
from dist_train.models.tabm import TabM
from tests.models.specs import make_inputs, make_spec


@pytest.mark.parametrize("adapters", ["all", "first", "packed"])
def test_it_is_the_model_of_the_authors(adapters: str) -> None:
    spec = make_spec(3, [4, 6])
    config = TabMConfig(members=4, width=8, dropout=0.0, adapters=adapters)  # type: ignore[arg-type]
    torch.manual_seed(0)
    ours = TabM(spec, config)
    theirs = tabm.TabM.make(
        n_num_features=3,
        cat_cardinalities=[4, 6],
        d_out=3,
        num_embeddings=rtdl.PiecewiseLinearEmbeddings(
            [bin_edges(column, 16) for column in spec.numeric], 8, activation=False, version="B"
        ),
        k=4,
        n_blocks=2,
        d_block=8,
        dropout=0.0,
        arch_type={"all": "tabm", "first": "tabm-mini", "packed": "tabm-packed"}[adapters],
    )
    inputs = make_inputs(spec, 20)
    own = ours.state_dict()
    names = {
        "num_module.": "features.numbers.embeddings.",
        "backbone.": "members.backbone.",
        "output.": "members.output.",
    }
    theirs.load_state_dict(
        {
            name: own[next((name.replace(a, b) for a, b in names.items() if name.startswith(a)), name)]
            for name in theirs.state_dict()
        }
    )
    assert len(theirs.state_dict()) == len(own)
    for training in (True, False):
        logits = ours.train(training)(*inputs)
        torch.testing.assert_close(logits, theirs(inputs.numeric, inputs.codes.long()), rtol=0, atol=1e-6)


def test_members_begin_apart_and_columns_are_scaled_as_wholes() -> None:
    torch.manual_seed(0)
    model = TabM(make_spec(2, [4]), TabMConfig(members=3, width=8, numeric_width=5))
    factors = model.members.backbone.blocks[0][0].r
    widths = model.features.widths
    assert widths == [5, 5, 4]
    for member in factors:
        assert [len(part.unique()) for part in member.split(widths)] == [1, 1, 1]
    assert len(factors.unique()) == 9


def test_biases_and_scaling_factors_are_not_decayed() -> None:
    model = TabM(make_spec(3, [4, 300], num_flags=1), TabMConfig(members=3, width=8))
    decayed = {name for name, _ in model.named_parameters()} - undecayed_parameters(model)
    assert decayed == {
        "features.numbers.embeddings.linear0.weight",
        "features.numbers.embeddings.linear.weight",
        "features.embeddings.0.weight",
        "members.backbone.blocks.0.0.weight",
        "members.backbone.blocks.1.0.weight",
        "members.output.weight",
    }


def test_columns_of_many_categories_are_embedded_by_a_rule_or_by_given_widths() -> None:
    spec = make_spec(0, [10, 300, 5000])
    assert TabM(spec, TabMConfig()).features.widths == [10, 39, 64]
    assert TabM(spec, TabMConfig(category_widths={"c0": 3, "c2": 7})).features.widths == [3, 39, 7]
    with pytest.raises(UserError, match=r"category_widths: there is no categorical column 'c9'; there is c0, c1, c2"):
        TabM(spec, TabMConfig(category_widths={"c9": 3}))


def test_keys_out_of_range_are_told_together() -> None:
    with pytest.raises(UserError) as caught:
        load_config(["model.name=tabm", "model.tabm.members=0", "model.tabm.numeric_bins=33", "model.tabm.dropout=1"])
    for text in ("members: must be at least 1", "numeric_bins: must be from 1 to 32", "dropout: a probability"):
        assert f"model.tabm.{text}" in str(caught.value)


def test_the_keys_of_a_mapping_reach_the_model() -> None:
    config = load_config(["model.name=tabm", "model.tabm.category_widths={c0: 5}"])
    model = build_model(make_spec(0, [4, 6]), config.model, seed=0)
    assert model.features.widths == [6, 5]
