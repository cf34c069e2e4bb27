"""The compiled optimizer step of networks of many shapes against autograd and torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.accel.blas import AVAILABLE
from dist_train.accel.cpu_mlp import FusedSequential, fuse_sequences
from dist_train.accel.cpu_network import CompiledNetwork, Updates, can_compile
from dist_train.determinism.batch_context import BatchContext
from dist_train.determinism.batch_norm import sync_batch_norm
from dist_train.determinism.dropout import convert_dropout
from dist_train.determinism.keyed_random import seeded
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.flat_parameters import FlatParameters
from tests.accel.test_cpu_mlp import deep, frozen, shallow
from tests.determinism.contexts import context_at, keep_gradients

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this build of torch does not offer its matrix product")


def no_bias() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 5, bias=False), nn.ReLU(), nn.Dropout(0.4), nn.Linear(5, 4, bias=False), nn.ReLU(),
        nn.Linear(4, 3, bias=False),
    )  # fmt: skip


def fused(make: Callable[[], nn.Module], lengths: tuple[int, ...]) -> FusedSequential:
    with seeded("compiled"):
        model = make()
    context = context_at(2, 1000, lengths, seed=3)
    model = sync_batch_norm(convert_dropout(model, context), Collectives(World()))
    fuse_sequences(model, context)
    keep_gradients(context, model, len(lengths))
    return cast(FusedSequential, model)


@pytest.mark.parametrize("make", [deep, shallow, no_bias])
@pytest.mark.parametrize("rows", [5, 33, 512])
def test_a_step_is_autograds_and_torchs(make: Callable[[], nn.Module], rows: int) -> None:
    x = torch.randn(rows, 7, generator=torch.Generator().manual_seed(1))
    y = torch.arange(rows) % 3
    weights = torch.tensor([1.0, 2.0, 0.5])
    model = fused(make, (rows,))
    loss = F.cross_entropy(model(x), y, weights, label_smoothing=0.1, reduction="sum")
    loss.backward()
    expected = {name: model.context.gradients[0][p] for name, p in model.named_parameters()}  # type: ignore[index]
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm() / weights[y].sum()

    twin = fused(make, (rows,))
    assert can_compile(twin)
    flat = FlatParameters(twin.parameters())
    before = {name: p.detach().clone().requires_grad_() for name, p in twin.named_parameters()}
    gradients, moments = flat.zeros(), flat.zeros(2)
    updates = Updates(flat.values, gradients, moments, [(0, flat.size, 0.1)])
    network = CompiledNetwork(twin, updates, lambda p: flat.view(gradients, p), weights, 0.1)
    assert network.ready
    results = torch.zeros((1, 5), dtype=torch.float64)
    settings = np.array([[0.01, 0.9, 0.99, 1e-6, 1, 0.05]])
    assert network.take(x, y, [BatchContext(2, 1000, (rows,))], settings, results) == 1

    found = [loss.item(), weights[y].sum().item(), norm.item(), 1.0]
    torch.testing.assert_close(results[0, [0, 1, 3, 4]].tolist(), found, rtol=1e-4, atol=1e-5)
    for name, parameter in twin.named_parameters():
        scale = expected[name].abs().max().item() + 1e-3
        torch.testing.assert_close(flat.view(gradients, parameter), expected[name], rtol=1e-3, atol=1e-4 * scale)
    for name, value in model.state_dict().items():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(twin.state_dict()[name], value)

    factor = min(1.0, 0.05 / (results[0, 3].item() + 1e-6)) / results[0, 1].item()
    for name, parameter in twin.named_parameters():
        before[name].grad = flat.view(gradients, parameter) * factor
    torch.optim.AdamW(before.values(), lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1).step()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name].detach(), rtol=1e-5, atol=1e-7)


def test_networks_that_are_not_compiled() -> None:
    assert not can_compile(nn.Sequential(nn.Linear(2, 2)))
    assert not can_compile(fused(lambda: frozen().layers, (2,)))  # type: ignore[arg-type,return-value]
    assert not can_compile(fused(lambda: shallow().double(), (2,)))
    hooked = fused(shallow, (2,))
    hooked[0].register_forward_hook(lambda *_: None)
    assert not can_compile(hooked)
    assert not can_compile(fused(lambda: nn.Sequential(nn.Linear(7, 1024), nn.ReLU(), nn.Linear(1024, 1024)), (2,)))


def test_a_network_whose_parameters_were_moved_is_not_ready() -> None:
    model = fused(shallow, (2,))
    flat = FlatParameters(model.parameters())
    gradients = flat.zeros()
    updates = Updates(flat.values, gradients, flat.zeros(2), [(0, flat.size, 0.0)])
    network = CompiledNetwork(model, updates, lambda p: flat.view(gradients, p), torch.ones(3), 0.0)
    assert network.ready
    model.eval()
    assert not network.ready
    FlatParameters(model.train().parameters())
    assert not network.ready
