"""Computing slice by slice: the plain model's numbers, under its names, or a clear refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.dropout import convert_dropout
from dist_train.determinism.keyed_random import seeded
from dist_train.determinism.own_operations import check_own_operations
from dist_train.determinism.sliced_modules import (
    UnknownModuleError,
    check_row_wise,
    convert_virtual_ranks,
    require_world_size,
)
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.models import registry
from dist_train.models.embeddings import Embedded
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.models.financial_classifier import build as build_financial_classifier
from tests.cli.in_process import command
from tests.commands import REPOSITORY
from tests.determinism.contexts import context_at, keep_gradients
from tests.models.specs import make_inputs, make_spec

LENGTHS = (5, 0, 1, 6)


def many_modules() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 3)
    )


def embedded() -> nn.Module:
    return Embedded(make_spec(5, [4, 6], num_flags=2), 2, lambda width: FinancialClassifier(width, 8, 3, (0.0, 0.0)))


def inputs_of(model: nn.Module) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Embedded):
        return make_inputs(make_spec(5, [4, 6], num_flags=2), sum(LENGTHS), dtype=torch.float64)
    return (torch.randn(sum(LENGTHS), 7, generator=generator, dtype=torch.float64),)


def converted(model: nn.Module) -> tuple[nn.Module, ModelContext]:
    context = context_at(slices=LENGTHS)
    model = convert_dropout(model, context)
    model = convert_virtual_ranks(model, context, Collectives(World()))
    if list(model.parameters()):
        keep_gradients(context, model, len(LENGTHS))
    return model, context


@pytest.mark.parametrize("make", [many_modules, lambda: FinancialClassifier(7, 8, 3, (0.0, 0.0)), embedded])
def test_outputs_gradients_and_buffers_are_the_plain_models(make) -> None:  # type: ignore[no-untyped-def]
    with seeded("slices"):
        plain = make().double()
    exact, context = converted(make().double())
    assert list(exact.state_dict()) == list(plain.state_dict())
    exact.load_state_dict(plain.state_dict())
    inputs = inputs_of(plain)
    own = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    theirs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    weights = torch.randn(sum(LENGTHS), 3, dtype=torch.float64)
    output, expected = exact(*own), plain(*theirs)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own[0].grad, theirs[0].grad, rtol=1e-11, atol=1e-12)
    assert context.gradients is not None
    sums = {name: sum(of_slice[p] for of_slice in context.gradients) for name, p in exact.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(sums[name], parameter.grad, rtol=1e-11, atol=1e-12, msg=name)
    torch.testing.assert_close(dict(exact.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.eval()(*inputs), plain.eval()(*inputs), rtol=1e-12, atol=1e-12)


def test_a_second_pass_adds_to_the_gradients_of_its_slices() -> None:
    model, context = converted(FinancialClassifier(7, 8, 3, (0.0, 0.0)).double())
    inputs = inputs_of(model)
    model(*inputs).sum().backward()
    assert context.gradients is not None
    once = [{p: g.clone() for p, g in of_slice.items()} for of_slice in context.gradients]
    model(*inputs).sum().backward()
    for of_slice, before in zip(context.gradients, once, strict=True):
        for parameter, gradient in of_slice.items():
            assert torch.equal(gradient, before[parameter] * 2)
            assert parameter.grad is None
    assert not any(gradient.any() for gradient in context.gradients[1].values())  # the empty slice


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.inner = nn.Linear(3, 3)


class OwnBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.inner = nn.Linear(3, 3)


def with_convolution(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 1, 1), inner)


class OddReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(0))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (OwnBuffer(), "1 is a OwnBuffer, and its own buffer seen"),
        (OddReLU(), "1 is a OddReLU"),
        (nn.Softmax(0), "1 is a Softmax"),
        (nn.Softmax(), "1 is a Softmax"),
        (nn.Flatten(0), "1 is a Flatten"),
        (nn.Sequential(nn.Embedding(3, 3, max_norm=1.0)), "1.0 is a Embedding"),
        (nn.Embedding(3, 3, sparse=True), "1 is a Embedding"),
        (nn.Embedding(3, 3, scale_grad_by_freq=True), "1 is a Embedding"),
        (nn.Conv1d(1, 1, 1), "1 is a Conv1d"),
        (nn.GRU(3, 3), "1 is a GRU"),
        (nn.BatchNorm2d(3), "1 is a BatchNorm2d"),
        (nn.AlphaDropout(), "1 is a AlphaDropout"),
        (OwnParameter(), "1 is a OwnParameter, and its own parameter scale"),
        (nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(3, 1)), "1.1 is a MultiheadAttention"),
    ],
)
def test_an_unknown_module_is_refused_by_name(layer: nn.Module, named: str) -> None:
    with pytest.raises(UnknownModuleError, match=named):
        converted(nn.Sequential(nn.Linear(3, 3), layer))


@pytest.mark.parametrize("layer", [nn.Softmax(1), nn.Softmax(-1), nn.Flatten(), nn.Embedding(3, 3)])
def test_the_same_module_is_known_where_it_is_row_wise(layer: nn.Module) -> None:
    plain = nn.Sequential(nn.Linear(3, 3), layer)
    names = list(plain.state_dict())
    assert list(converted(plain)[0].state_dict()) == names


class MinusMean(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        logits: Tensor = self.inner(x - x.mean(0), *others)
        return logits


def test_rows_that_are_mixed_between_modules_are_found_out() -> None:
    with seeded("slices"):
        model, _ = converted(FinancialClassifier(7, 8, 3))
        mixing, _ = converted(MinusMean(FinancialClassifier(7, 8, 3)))
        embedding, _ = converted(embedded())
    rows = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    check_row_wise(model, [rows], "a model")
    check_row_wise(embedding, make_inputs(make_spec(5, [4, 6], num_flags=2), 4), "a model")
    assert model.training
    with pytest.raises(UnknownModuleError, match="what a model puts out for a row depends on the rows beside it"):
        check_row_wise(mixing, [rows], "a model")


def test_a_run_of_a_model_that_mixes_rows_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = build_financial_classifier
    arguments = [
        f"run.dir={tmp_path}",
        "run.name=run",
        "train.max_steps=1",
        "wandb.mode=disabled",
        "runtime.device=cpu",
    ]
    for wrap, culprit in [(MinusMean, "financial_classifier puts out"), (with_convolution, "0 is a Conv1d")]:
        monkeypatch.setitem(registry._BUILDS, "financial_classifier", lambda *a, wrap=wrap: wrap(make(*a)))
        done = command("train", REPOSITORY / "configs" / "credit_risk.yaml", *arguments, "train.virtual_ranks=4")
        assert done.code == 2, done.err
        assert culprit in done.err
        assert "Traceback" not in done.err
        assert list(tmp_path.iterdir()) == []


def test_a_world_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    for world in (1, 2, 3, 4, 6, 8, 12, 24):
        require_world_size(24, world)
    with pytest.raises(UserError, match=r"24 cannot be shared by 5 ranks; it works on 1, 2, 3, 4, 6, 8, 12 or 24"):
        require_world_size(24, 5)
    with pytest.raises(UserError, match=r"it works on 1$"):
        require_world_size(1, 2)


class OwnProduct(nn.Module):
    """A container whose forward computes a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.inner(x).view(len(x), 2, 3)
        return (pairs @ pairs.transpose(1, 2)).flatten(1)


class DeclaredProduct(OwnProduct):
    """The same, declared to treat each row by itself."""

    row_wise = True


class Residual(nn.Module):
    """A container that combines rows elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.cat([x + self.inner(x), x], 1)[:, 2:]
        return out


class OwnProductIn(OwnProduct):
    """The product is computed in training alone, or in evaluation alone."""

    def __init__(self, *, training: bool) -> None:
        super().__init__()
        self.computed_in_training = training

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training is self.computed_in_training else x[:, :4] + 0


class OwnUseOfParameter(nn.Module):
    """A container that uses a parameter of a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * self.inner.weight[0]
        return out


ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_what_a_container_computes_itself_is_refused_unless_it_rounds_alike_in_any_company() -> None:
    for refused in (OwnProduct(), nn.Sequential(OwnProduct(), nn.Linear(4, 3)), OwnProductIn(training=True)):
        with pytest.raises(UnknownModuleError, match="the forward of a model itself computes bmm"):
            check_own_operations(converted(refused)[0], [ROWS], "a model")
    sequence = nn.Sequential(DeclaredProduct(), nn.Dropout(0.5), nn.Linear(4, 3))
    for allowed in (Residual(), DeclaredProduct(), sequence, OwnProductIn(training=False)):
        check_own_operations(converted(allowed)[0], [ROWS], "a model")
    check_own_operations(converted(FinancialClassifier(6, 8, 3))[0], [ROWS], "a model")


def test_a_container_that_uses_a_parameter_of_another_module_is_refused() -> None:
    model = converted(OwnUseOfParameter())[0]
    with pytest.raises(UnknownModuleError, match=r"itself uses the parameter inner\.weight"):
        check_own_operations(model, [ROWS], "a model")
    assert all(module.training for module in model.modules())
    model.inner.weight.requires_grad_(False)  # type: ignore[union-attr]
    check_own_operations(model, [ROWS], "a model")


def test_a_declared_module_is_computed_slice_by_slice_as_a_whole() -> None:
    with seeded("slices"):
        plain = DeclaredProduct().double()
    exact, context = converted(DeclaredProduct().double())
    assert list(exact.state_dict()) == list(plain.state_dict())
    exact.load_state_dict(plain.state_dict())
    x = torch.randn(sum(LENGTHS), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output, expected = exact(x), plain(x)
    (output**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert context.gradients is not None
    for name, parameter in exact.named_parameters():
        summed = sum(of_slice[parameter] for of_slice in context.gradients)
        torch.testing.assert_close(summed, plain.get_parameter(name).grad, rtol=1e-11, atol=1e-12, msg=name)


class DeclaredWithBatchNorm(nn.Module):
    row_wise = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


def test_a_declared_module_with_a_batch_norm_is_refused() -> None:
    with pytest.raises(UnknownModuleError, match="its BatchNorm norm mixes rows"):
        converted(DeclaredWithBatchNorm())


def test_a_frozen_batch_norm_has_no_gradient() -> None:
    model = FinancialClassifier(7, 8, 3, (0.0, 0.0)).double()
    model.layers[1].requires_grad_(False)
    exact, context = converted(model)
    exact(*inputs_of(model)).sum().backward()
    assert context.gradients is not None
    assert len(context.gradients[0]) == 6


class OneHotInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        codes = (x[:, 0] > 0).long()
        out: Tensor = self.inner(x) + nn.functional.one_hot(codes, 3)
        return out


def test_one_hot_between_modules_only_moves_numbers() -> None:
    model = converted(OneHotInside())[0]
    check_own_operations(model, [ROWS], "a model")
    assert all(module.training for module in model.modules())
