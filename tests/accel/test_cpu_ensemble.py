"""The fused ensemble against the authors' modules: logits and gradients to rounding, masks to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.accel import accelerate
from dist_train.accel.cpu_ensemble import BLOCK_ROWS, FusedMembers
from dist_train.config.families import TabMConfig
from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.determinism.dropout import convert_dropout
from dist_train.models.tabm import TabM
from tests.models.specs import make_inputs, make_spec

SPEC = make_spec(4, [4, 30], num_flags=1)


def build(*, fused: bool, dtype: torch.dtype = torch.float64, **keys: Any) -> tuple[Any, ModelContext]:
    torch.manual_seed(0)
    config = TabMConfig(**({"members": 3, "width": 7, "dropout": 0.3, "numeric_width": 3} | keys))
    context = ModelContext(seed=5)
    model: nn.Module = TabM(SPEC, config).to(dtype)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += 0.3 * torch.randn_like(parameter)
    model = convert_dropout(model, context)
    return (accelerate(model, context, torch.device("cpu")) if fused else model), context


def gradients(model: nn.Module, context: ModelContext, num_rows: int) -> dict[str, Tensor]:
    dtype = next(model.parameters()).dtype
    inputs = make_inputs(SPEC, num_rows, dtype=dtype)
    with context.bound(BatchContext(epoch=2, first_row=11, slices=(num_rows,))):
        logits = model(*inputs)
    model.zero_grad()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)).sum().backward()
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("num_rows", [1, 5, BLOCK_ROWS, 2 * BLOCK_ROWS + 13])
@pytest.mark.parametrize("keys", [{}, {"blocks": 1}, {"blocks": 3, "width": 8, "dropout": 0.0}], ids=str)
def test_everything_is_what_the_modules_make(keys: dict[str, Any], num_rows: int) -> None:
    model, context = build(fused=True, **keys)
    assert isinstance(model.members, FusedMembers)
    found, expected = gradients(model, context, num_rows), gradients(*build(fused=False, **keys), num_rows)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_float32_agrees_to_rounding() -> None:
    found, expected = (gradients(*build(fused=f, dtype=torch.float32), 600) for f in (True, False))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=name)


def test_passes_side_by_side_and_without_a_backward_pass_disturb_no_other() -> None:
    model, context = build(fused=True)
    expected = gradients(*build(fused=False), 20)
    inputs = make_inputs(SPEC, 20, seed=4, dtype=torch.float64)
    with context.bound(BatchContext(slices=(20,))):
        kept = model(*inputs)
        model(*inputs)
    found = gradients(model, context, 20)
    kept.sum().backward()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("keys", [{"adapters": "first"}, {"adapters": "packed"}], ids=str)
def test_other_ensembles_stay_as_they_are(keys: dict[str, Any]) -> None:
    model, _ = build(fused=True, **keys)
    assert not isinstance(model.members, FusedMembers)


def test_it_steps_aside_where_it_is_not_made_for_the_inputs() -> None:
    model, context = build(fused=True, dtype=torch.float32)
    inputs = make_inputs(SPEC, 9)
    plain, of_plain = build(fused=False, dtype=torch.float32)
    logits = []
    for one, shared in ((model, context), (plain, of_plain)):
        with shared.bound(BatchContext(slices=(9,))), torch.autocast("cpu", torch.bfloat16):
            logits.append(one(*inputs))
    assert torch.equal(*logits)
    model.members.output.bias.requires_grad_(False)
    with context.bound(BatchContext(slices=(9,))):
        model(*inputs).sum().backward()
    assert model.members.output.bias.grad is None
    assert torch.equal(model.eval()(*inputs), plain.eval()(*inputs))
    assert list(model.state_dict()) == list(plain.state_dict())
