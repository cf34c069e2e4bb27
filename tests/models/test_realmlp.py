"""What RealMLP computes, beside the formulas of the paper."""

from __future__ import annotations

import torch
from torch.nn import functional

from dist_train.config.load import load_config
from dist_train.execution.optimizer import lr_multipliers, undecayed_parameters
from dist_train.models.realmlp import ParametricActivation, RealMLP, TangentLinear
from dist_train.models.registry import build_model
from tests.models.specs import make_inputs, make_spec


def small(*keys: str) -> RealMLP:
    config = load_config(["model.name=realmlp", "model.realmlp.width=8", "model.realmlp.blocks=2", *keys])
    model = build_model(make_spec(3, [4, 6], num_flags=1), config.model, seed=1)
    assert isinstance(model, RealMLP)
    return model


def test_a_layer_is_divided_by_the_root_of_its_inputs() -> None:
    layer, x = TangentLinear(16, 3), torch.ones(5, 16)
    expected = x @ (layer.weight / 4).T + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_an_activation_begins_as_it_is_and_its_share_leads_to_the_identity() -> None:
    x = torch.linspace(-3, 3, 8).expand(2, 8)
    for name, function in (("selu", functional.selu), ("mish", functional.mish)):
        activation = ParametricActivation(8, name)
        torch.testing.assert_close(activation(x), function(x))
        torch.nn.init.zeros_(activation.share)
        assert torch.equal(activation(x), x)


def test_logits_are_those_of_the_formulas() -> None:
    model = small("model.realmlp.activation=mish").eval()
    inputs = make_inputs(make_spec(3, [4, 6], num_flags=1), 20)
    scale, first, act1, _, second, act2, _, last = model.layers
    x = model.features(*inputs) * scale.factors
    for layer, act in ((first, act1), (second, act2)):
        y = functional.linear(x / layer.weight.shape[1] ** 0.5, layer.weight, layer.bias)
        x = (1 - act.share) * y + act.share * functional.mish(y)
    expected = functional.linear(x / last.weight.shape[1] ** 0.5, last.weight, last.bias)
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_learning_rates_are_relative_and_weights_alone_decay() -> None:
    model = small()
    rates = lr_multipliers(model)
    assert rates["layers.0.factors"] == 6.0
    assert {name: rate for name, rate in rates.items() if name != "layers.0.factors"} == {
        name: 0.1 for name, _ in model.layers.named_parameters(prefix="layers") if name.endswith(("bias", "share"))
    }
    kept = undecayed_parameters(model)
    assert {name for name, _ in model.layers.named_parameters(prefix="layers") if name not in kept} == {
        "layers.1.weight",
        "layers.4.weight",
        "layers.7.weight",
    }
