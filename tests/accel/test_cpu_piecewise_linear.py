"""The fused piecewise linear embedding against the authors' module."""

from __future__ import annotations

import copy
import warnings

import pytest
import rtdl_num_embeddings as rtdl
import torch
from torch import Tensor, nn

from dist_train.accel.cpu_piecewise_linear import FusedPiecewiseLinear, fuse_piecewise_linear

KNOTS = {
    "alike": [[-1.0, 0.0, 0.5, 2.0], [-2.0, -1.0, 1.0, 1.5]],
    "of many numbers": [[-1.0, 0.0, 0.5, 2.0, 2.5], [-2.0, 1.0, 1.5], [0.0, 1.0, 2.0, 3.0]],
    "one bin": [[-1.0, 1.0], [-2.0, -1.0, 1.0, 1.5]],
}


def build(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* just two bin edges")
        module = rtdl.PiecewiseLinearEmbeddings(
            [torch.tensor(knots) for knots in KNOTS[kind]], 5, activation=False, version="B"
        )
    nn.init.normal_(module.linear.weight)
    return module.to(dtype)  # type: ignore[no-any-return]


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    out = module(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype))
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KNOTS)
def test_everything_is_what_the_module_makes(kind: str, dtype: torch.dtype) -> None:
    plain = build(kind, dtype)
    fused = fuse_piecewise_linear(copy.deepcopy(plain))
    assert isinstance(fused, FusedPiecewiseLinear)
    at_knots = torch.tensor([-9.0, -2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 9], dtype=dtype).unsqueeze(1)
    at_random = torch.randn((400, 1), generator=torch.Generator().manual_seed(1), dtype=dtype) * 2
    x = torch.cat([at_knots, at_random]).expand(-1, len(KNOTS[kind])).contiguous()
    found, expected = results(fused, x), results(plain, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert fused(x[:0]).shape == (0, len(KNOTS[kind]), 5)


def test_it_steps_aside_where_it_is_not_made_for_the_inputs() -> None:
    plain = build("alike", torch.float32)
    fused = fuse_piecewise_linear(copy.deepcopy(plain))
    x = torch.randn(7, 2)
    assert torch.equal(fused.eval()(x), plain.eval()(x))
    for module in (fused, plain):
        module.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), plain(x))
    moving = x.clone().requires_grad_()
    fused(moving).sum().backward()
    assert moving.grad is not None
    assert list(fused.state_dict()) == list(plain.state_dict())
