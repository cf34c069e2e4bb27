"""The fused network against torch's own modules: outputs, gradients, running statistics, masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_train.accel.cpu_layers import BLOCK_ROWS
from dist_train.accel.cpu_mlp import FusedSequential, fuse_sequences
from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.batch_norm import sync_batch_norm
from dist_train.determinism.dropout import convert_dropout
from dist_train.determinism.keyed_random import seeded
from dist_train.determinism.sliced_modules import convert_virtual_ranks
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.models.embeddings import Embedded
from dist_train.models.financial_classifier import FinancialClassifier
from tests.determinism.contexts import context_at, keep_gradients
from tests.models.specs import make_inputs, make_spec


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 12, bias=False),
        nn.BatchNorm1d(12, momentum=None),
        nn.ReLU(),
        nn.Linear(12, 9),
        nn.BatchNorm1d(9, affine=False),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(9, 9),
        nn.ReLU(),
        nn.Linear(9, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(5, 3),
    )


def shallow() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 3))


def embedded() -> nn.Module:
    return Embedded(make_spec(5, [4, 6], num_flags=2), 2, lambda width: FinancialClassifier(width, 8, 3))


def frozen() -> nn.Module:
    model = FinancialClassifier(7, 8, 3)
    model.layers[4].weight.requires_grad_(False)
    model.layers[0].bias.requires_grad_(False)
    return model


MODELS: list[Callable[[], nn.Module]] = [lambda: FinancialClassifier(7, 8, 3), deep, shallow, embedded, frozen]
LENGTHS = [(5, 0, 1, 6), (2,), (2 * BLOCK_ROWS + 3,), (BLOCK_ROWS + 1, 3, BLOCK_ROWS)]


def build(make: Callable[[], nn.Module], lengths: tuple[int, ...], *, cpu_mlp: bool, sliced: bool) -> nn.Module:
    with seeded("fused"):
        model = make().double()
    context = context_at(2, 1000, lengths, seed=3)
    model = convert_dropout(model, context)
    alone = Collectives(World())
    model = convert_virtual_ranks(model, context, alone) if sliced else sync_batch_norm(model, alone)
    if cpu_mlp:
        fuse_sequences(model, context)
        assert any(type(module) is FusedSequential for module in model.modules())
    if sliced or cpu_mlp:
        keep_gradients(context, model, len(lengths))
    if cpu_mlp and not sliced and context.gradients:
        for parameter, gradient in context.gradients[0].items():
            parameter.grad = gradient
    model.shared = context  # type: ignore[assignment]
    return model


def inputs_of(model: nn.Module, num_rows: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Embedded):
        return make_inputs(make_spec(5, [4, 6], num_flags=2), num_rows, dtype=torch.float64)
    return (torch.randn(num_rows, 7, generator=generator, dtype=torch.float64),)


def trained(model: nn.Module, lengths: tuple[int, ...], *, sliced: bool) -> dict[str, Tensor]:
    """All that two forward and backward passes leave."""
    num_rows = sum(lengths)
    inputs = tuple(x.requires_grad_(x.is_floating_point()) for x in inputs_of(model, num_rows))
    weights = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for number in range(2):
        output = model(*inputs)
        (output * weights).sum().backward()
        seen[f"output {number}"] = output.detach()
    assert inputs[0].grad is not None
    seen["input gradient"] = inputs[0].grad
    for name, parameter in model.named_parameters():
        if sliced and parameter.requires_grad:
            of_slices = torch.stack([of_slice[parameter] for of_slice in model.shared.gradients])  # type: ignore[union-attr]
            # A bias that BatchNorm takes away again has no gradient; over all slices that is what the modules find too.
            cancelled = name in ("layers.0.bias", "classifier.layers.0.bias", "3.bias", "9.bias")
            seen[name] = of_slices.sum(0) if cancelled else of_slices
            assert parameter.grad is None
        elif parameter.requires_grad:
            assert parameter.grad is not None
            seen[name] = parameter.grad.clone()
        else:
            assert parameter.grad is None
    seen |= {f"state {name}": value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        seen["evaluated"] = model.eval()(*inputs)
    return seen


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sliced", [False, True], ids=["autograd", "sliced"])
@pytest.mark.parametrize("make", MODELS)
def test_everything_is_what_the_modules_make(
    make: Callable[[], nn.Module], sliced: bool, lengths: tuple[int, ...]
) -> None:
    if not sliced:
        lengths = (sum(lengths),)
    ours = trained(build(make, lengths, cpu_mlp=True, sliced=sliced), lengths, sliced=sliced)
    theirs = trained(build(make, lengths, cpu_mlp=False, sliced=sliced), lengths, sliced=sliced)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-11, msg=name)


def test_a_pass_that_is_not_followed_by_its_backward_pass_disturbs_no_other() -> None:
    model = build(lambda: FinancialClassifier(7, 8, 3), (6,), cpu_mlp=True, sliced=False)
    (x,) = inputs_of(model, 6)
    first = model(x)
    second = model(x * 2)
    first.sum().backward()
    alone = build(lambda: FinancialClassifier(7, 8, 3), (6,), cpu_mlp=True, sliced=False)
    alone(x).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name  # type: ignore[arg-type]
    second.sum().backward()


def test_a_model_of_other_modules_stays_as_it_is() -> None:
    for last in (nn.ReLU(), nn.Tanh()):
        model = nn.Sequential(nn.Linear(3, 3), last)
        fuse_sequences(model, ModelContext())
        assert type(model) is nn.Sequential


def test_float32_agrees_to_rounding() -> None:
    lengths = (1000,)
    model, plain = (
        build(lambda: FinancialClassifier(7, 64, 3), lengths, cpu_mlp=f, sliced=False) for f in (True, False)
    )
    (x,) = inputs_of(model, 1000)
    outputs = [m.float()(x.float()) for m in (model, plain)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert outputs[0].dtype == torch.float32


class Members(nn.Module):
    """A feed-forward part that is applied to each of several members of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(x.unsqueeze(1).expand(-1, 5, -1)).mean(1)
        return out


class ResidualBlock(nn.Module):
    """A dropout that follows a fused sequence, outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 7))
        self.dropout = nn.Dropout(0.4)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.dropout(self.part(x)))
        return out


@pytest.mark.parametrize("sliced", [False, True], ids=["autograd", "sliced"])
@pytest.mark.parametrize("make", [Members, ResidualBlock])
def test_inputs_of_other_shapes_and_modules_after_it_are_what_they_were(
    make: Callable[[], nn.Module], sliced: bool
) -> None:
    """More rows than a block has: a fused sequence must leave no trace of where it stood."""
    lengths = (BLOCK_ROWS + 5, 3) if sliced else (2 * BLOCK_ROWS + 8,)
    ours = trained(build(make, lengths, cpu_mlp=True, sliced=sliced), lengths, sliced=sliced)
    theirs = trained(build(make, lengths, cpu_mlp=False, sliced=sliced), lengths, sliced=sliced)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-11, msg=name)
