"""What every registered family of models keeps to. A new family is one name more in FAMILIES."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dist_train.config import families
from dist_train.config.load import load_config
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.determinism.keyed_random import seeded
from dist_train.models.registry import build_model
from tests.models.specs import make_inputs, make_spec

FAMILIES: dict[str, list[str]] = {
    "financial_classifier": ["model.hidden_dim=8"],
    "financial_classifier with embeddings": ["model.hidden_dim=8", "model.embedding_dim=3"],
    "tabm": ["model.tabm.members=4", "model.tabm.width=8"],
    "resnet": ["model.resnet.width=8"],
    "realmlp": ["model.realmlp.width=8"],
}
"""Name of the family, and the keys of a small model of it."""

SPECS = {
    "numbers": make_spec(5),
    "numbers with flags": make_spec(4, num_flags=2),
    "categories": make_spec(0, [4, 6]),
    "all": make_spec(3, [4, 6, 300], num_flags=3, num_classes=4),
}
NUM_ROWS = 40


def build(family: str, spec: FeatureSpec, seed: int = 0) -> nn.Module:
    config = load_config([f"model.name={family.partition(' ')[0]}", *FAMILIES[family]])
    return build_model(spec, config.model, seed=seed)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> FeatureSpec:
    return SPECS[request.param]


def test_every_family_is_here() -> None:
    assert {family.partition(" ")[0] for family in FAMILIES} == set(families.BUILT_IN)


def test_logits_are_those_of_the_classes_or_of_members_and_classes(family: str, spec: FeatureSpec) -> None:
    model = build(family, spec)
    for num_rows in (NUM_ROWS, 1, 0):
        logits = model.eval()(*make_inputs(spec, num_rows))
        assert logits.shape[0] == num_rows
        assert logits.shape[-1] == spec.num_classes
        assert logits.ndim in (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_trainable_parameter_gets_a_finite_gradient(family: str, spec: FeatureSpec, dtype: torch.dtype) -> None:
    model = build(family, spec).to(dtype)
    logits = model(*make_inputs(spec, NUM_ROWS, dtype=dtype))
    assert logits.dtype == dtype
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    (logits * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_a_state_dict_is_all_that_makes_another_model_the_same(family: str, spec: FeatureSpec) -> None:
    model, other = build(family, spec, 1).eval(), build(family, spec, 2).eval()
    inputs = make_inputs(spec, NUM_ROWS)
    assert not torch.equal(model(*inputs), other(*inputs))
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, strict=True)
    assert torch.equal(model(*inputs), other(*inputs))


def test_initial_weights_are_a_function_of_the_seed(family: str, spec: FeatureSpec) -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.detach().flatten() for p in build(family, spec, seed).parameters()])

    first = weights(1)
    with seeded("something else", 7):
        before = torch.get_rng_state()
        assert torch.equal(weights(1), first)
        assert torch.equal(torch.get_rng_state(), before), "building a model drew from torch's global generator"
    assert not torch.equal(weights(2), first)


def test_forward_draws_from_no_global_generator(family: str, spec: FeatureSpec) -> None:
    """Apart from nn.Dropout, which the session replaces by a keyed one."""
    model = build(family, spec)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.0
    before = torch.get_rng_state()
    model.train()(*make_inputs(spec, NUM_ROWS)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def row_wise_calls(model: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Each module of a model that is declared row-wise, with the arguments that a forward pass calls it with."""
    seen: list[tuple[str, nn.Module, tuple[Tensor, ...]]] = []
    handles = [
        module.register_forward_pre_hook(lambda module, arguments, name=name: seen.append((name, module, arguments)))
        for name, module in model.named_modules()
        if getattr(module, "row_wise", False)
    ]
    model(*inputs)
    for handle in handles:
        handle.remove()
    yield from seen


def test_in_evaluation_and_in_modules_that_are_declared_row_wise_a_row_stands_for_itself(
    family: str, spec: FeatureSpec
) -> None:
    model, inputs = build(family, spec).eval(), tuple(make_inputs(spec, NUM_ROWS))
    for name, module, arguments in [("the model", model, inputs), *row_wise_calls(model, inputs)]:
        assert all(len(x) == NUM_ROWS for x in arguments), name
        together = module(*arguments)
        for row in (0, 3, NUM_ROWS - 1):
            alone = module(*(x[row : row + 1] for x in arguments))
            torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-6, atol=1e-6, msg=name)
