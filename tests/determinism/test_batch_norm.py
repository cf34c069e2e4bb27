"""BatchNorm over ranks against nn.BatchNorm1d on the joined batch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.determinism.batch_norm import (
    GatheredBatchNorm1d,
    sync_batch_norm,
    zero_grad_of_biases_before_batchnorm,
)
from dist_train.determinism.keyed_random import seeded
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from tests.ranks import on_ranks

FEATURES = 5
Case = dict[str, Any]

# Rows on each rank at each of the two training steps.
SHARDS = {
    "even": [[8, 8], [8, 8]],
    "ragged": [[9, 4], [5, 12]],
    "one row": [[7, 1], [1, 6]],
    "no row": [[7, 0], [0, 6]],
    "all ranks but one empty": [[0, 6, 0], [9, 0, 0]],
    "a row each": [[1, 1, 1], [1, 1, 1]],
    "three ragged": [[4, 0, 3], [1, 6, 2]],
    "four": [[3, 1, 0, 7], [2, 2, 2, 2]],
}
OPTIONS: dict[str, Case] = {
    "default": {},
    "cumulative average": {"momentum": None},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "other eps and momentum": {"eps": 1e-3, "momentum": 0.3},
}


def layer(options: Case, dtype: torch.dtype) -> nn.BatchNorm1d:
    """A layer with weights that are not ones and zeros."""
    norm = nn.BatchNorm1d(FEATURES, **options).to(dtype)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, FEATURES))
            norm.bias.copy_(torch.linspace(-1, 1, FEATURES))
    return norm


def batch(step: int, rows: int, mean: float) -> tuple[Tensor, Tensor]:
    """Rows and the gradient that comes back to their outputs, float64."""
    rng = np.random.default_rng([step, rows])
    x = torch.from_numpy(rng.normal(mean, 1, size=(rows, FEATURES)))
    return x, torch.from_numpy(rng.normal(size=(rows, FEATURES)))


def run_layer(norm: nn.Module, parts: Sequence[tuple[Tensor, Tensor]], held_out: Tensor) -> dict[str, Tensor]:
    """Train on the parts, then evaluate; everything that a layer does."""
    seen: dict[str, Tensor] = {}
    for step, (x, grad) in enumerate(parts):
        x = x.clone().requires_grad_()
        norm.zero_grad()
        out = norm(x)
        out.backward(grad)
        assert x.grad is not None
        seen |= {f"output {step}": out.detach(), f"input gradient {step}": x.grad}
        for name, p in norm.named_parameters():
            assert p.grad is not None
            seen[f"sum of {name} gradient {step}"] = p.grad.clone()
    seen |= {f"state {name}": value.clone() for name, value in norm.state_dict().items()}
    seen["held out"] = norm.eval()(held_out).detach()
    return seen


def on_a_rank(
    collectives: Collectives, shards: list[list[int]], options: Case, dtype: torch.dtype, mean: float
) -> dict[str, npt.NDArray[Any]]:
    norm = sync_batch_norm(nn.Sequential(layer(options, dtype)), collectives)
    assert isinstance(norm[0], GatheredBatchNorm1d)  # type: ignore[index]
    parts = []
    for step, lengths in enumerate(shards):
        begin = sum(lengths[: collectives.rank])
        x, grad = batch(step, sum(lengths), mean)
        rows = slice(begin, begin + lengths[collectives.rank])
        parts.append((x[rows].to(dtype), grad[rows].to(dtype)))
    held_out = batch(9, 6, mean)[0].to(dtype)
    return {name.replace("0.", ""): value.numpy() for name, value in run_layer(norm, parts, held_out).items()}


def join(ranks: list[dict[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """What the ranks have seen, as one process sees it."""
    joined = {}
    for name, first in ranks[0].items():
        values = [rank[name] for rank in ranks]
        if name.startswith("sum of"):
            joined[name] = np.sum(values, 0)
        elif name.startswith(("output", "input gradient")):
            joined[name] = np.concatenate(values)
        else:
            for value in values:
                np.testing.assert_array_equal(value, first, err_msg=f"{name} differs between ranks")
            joined[name] = first
    return joined


def reference(shards: list[list[int]], options: Case, dtype: torch.dtype, mean: float) -> dict[str, npt.NDArray[Any]]:
    parts = [tuple(t.to(dtype) for t in batch(step, sum(lengths), mean)) for step, lengths in enumerate(shards)]
    seen = run_layer(layer(options, dtype), parts, batch(9, 6, mean)[0].to(dtype))  # type: ignore[arg-type]
    return {name: value.numpy() for name, value in seen.items()}


def check(shards: list[list[int]], options: Case, dtype: torch.dtype, tolerance: float, mean: float = 0.7) -> None:
    ours = join(on_ranks(len(shards[0]), on_a_rank, shards, options, dtype, mean))
    theirs = reference(shards, options, dtype, mean)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_allclose(ours[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS.keys())
def test_equals_one_process_in_float32(shards: list[list[int]]) -> None:
    check(shards, {}, torch.float32, 1e-6)


@pytest.mark.parametrize("shards", [SHARDS["ragged"], SHARDS["no row"], SHARDS["four"]], ids=["ragged", "none", "four"])
def test_equals_one_process_in_float64(shards: list[list[int]]) -> None:
    check(shards, {}, torch.float64, 1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: Case) -> None:
    check(SHARDS["three ragged"], options, torch.float64, 1e-12)


def test_far_from_zero_in_float64() -> None:
    """The textbook formula, mean of squares less square of mean, loses half of the digits here."""
    check(SHARDS["three ragged"], {}, torch.float64, 1e-11, mean=1e4)


def test_far_from_zero_in_float32_no_worse_than_torch() -> None:
    """A float32 number near 1e4 is known to 1e-3 of a standard deviation, and torch's own layer loses as much."""
    shards, mean = [[90, 40, 30], [50, 120, 70]], 1e4
    ours = join(on_ranks(3, on_a_rank, shards, {}, torch.float32, mean))
    theirs = reference(shards, {}, torch.float32, mean)
    exact_parts = [tuple(t.float().double() for t in batch(step, sum(n), mean)) for step, n in enumerate(shards)]
    exact = run_layer(layer({}, torch.float64), exact_parts, batch(9, 6, mean)[0].float().double())  # type: ignore[arg-type]
    for name, value in exact.items():
        error = np.abs(ours[name] - value.numpy()).max()
        assert error <= 1e-6 * np.abs(value.numpy()).max() + np.abs(theirs[name] - value.numpy()).max(), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_world_of_one_is_the_same_code(options: Case) -> None:
    check([[8], [5]], options, torch.float32, 1e-6)


def test_without_collectives_it_finds_the_process_group() -> None:
    """As torch's own conversion is called, with the model alone."""
    norm = sync_batch_norm(layer({}, torch.float32))
    assert isinstance(norm, GatheredBatchNorm1d)
    assert norm.collectives.size == 1
    assert on_ranks(2, size_of_default_group) == [(0, 2), (1, 2)]


def size_of_default_group(_collectives: Collectives) -> tuple[int, int]:
    norm = sync_batch_norm(nn.Sequential(layer({}, torch.float32)))[0]  # type: ignore[index]
    return norm.collectives.rank, norm.collectives.size


def test_layers_of_another_kind() -> None:
    """Alone, they need nothing from anybody."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert sync_batch_norm(model, Collectives(World())) is model
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="tensor of 3 dimensions"):
        sync_batch_norm(layer({}, torch.float32))(torch.ones(2, FEATURES, 3))


def replace_in_a_model(collectives: Collectives) -> None:
    model = nn.Sequential(nn.Linear(2, FEATURES), nn.Sequential(layer({}, torch.float32))).eval()
    before = dict(model.state_dict())
    parameters = list(model.parameters())
    synced = sync_batch_norm(model, collectives)
    assert isinstance(synced.get_submodule("1.0"), GatheredBatchNorm1d)
    assert not synced.get_submodule("1.0").training
    assert list(synced.state_dict()) == list(before)
    assert all(torch.equal(synced.state_dict()[name], value) for name, value in before.items())
    assert all(one is other for one, other in zip(synced.parameters(), parameters, strict=True))
    with pytest.raises(TypeError, match=r"^1: BatchNorm2d cannot be synchronised on cpu"):
        sync_batch_norm(nn.Sequential(nn.Flatten(), nn.BatchNorm2d(3)), collectives)


def single_row(collectives: Collectives) -> None:
    norm = sync_batch_norm(nn.Sequential(layer({}, torch.float32)), collectives)
    with pytest.raises(ValueError, match="at least two rows over all ranks"):
        norm(torch.ones(1 - collectives.rank, FEATURES))


def half_precision(collectives: Collectives) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    norm = sync_batch_norm(nn.Sequential(layer({}, torch.float32)), collectives)
    x = batch(0, 20, 0.7)[0].bfloat16()[collectives.rank * 10 :][:10].requires_grad_()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    return out.detach().float().numpy(), x.grad.float().numpy()


def uneven_evaluation(collectives: Collectives) -> None:
    """Ranks evaluate different numbers of passes: nothing may wait for another rank there."""
    for options in ({}, {"track_running_stats": False}):
        norm = sync_batch_norm(nn.Sequential(layer(options, torch.float32)), collectives).eval()
        rows = batch(0, 4, 0.0)[0].float()
        for _ in range(collectives.rank):
            torch.testing.assert_close(norm(rows), layer(options, torch.float32).eval()(rows))


@pytest.mark.parametrize("check_on_ranks", [replace_in_a_model, single_row, uneven_evaluation])
def test_on_two_ranks(check_on_ranks: Any) -> None:
    on_ranks(2, check_on_ranks)


def test_half_precision_rows() -> None:
    """Statistics are computed in float32, so only the rounding of the output is half precision's."""
    ours = [np.concatenate(values) for values in zip(*on_ranks(2, half_precision), strict=True)]
    norm = layer({}, torch.float32)
    x = batch(0, 20, 0.7)[0].bfloat16().float().requires_grad_()
    out = norm(x)
    out.bfloat16().float().square().sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(ours[0], out.detach().numpy(), rtol=2**-8, atol=2**-8)
    np.testing.assert_allclose(ours[1], x.grad.numpy(), rtol=2**-7, atol=2**-6)


def half_precision_without_rows(collectives: Collectives) -> npt.NDArray[Any]:
    """A tail of fewer rows than ranks, under autocast: torch's SyncBatchNorm gathers messages of unequal sizes here."""
    norm = sync_batch_norm(nn.Sequential(layer({}, torch.float32)), collectives)
    x = batch(0, 3, 0.7)[0].bfloat16()[: 3 * (collectives.rank == 0)].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.isfinite().all()
    running: npt.NDArray[Any] = norm[0].running_var.numpy()  # type: ignore[index,union-attr,operator]
    return running


def test_a_rank_without_rows_in_half_precision() -> None:
    first, second = on_ranks(2, half_precision_without_rows)
    np.testing.assert_array_equal(first, second)
    plain = layer({}, torch.float32)
    plain(batch(0, 3, 0.7)[0].bfloat16().float())
    assert plain.running_var is not None
    np.testing.assert_allclose(first, plain.running_var.numpy(), rtol=1e-5)


def test_on_several_gpus_it_is_this_layer_and_on_one_the_plain_one() -> None:
    """The conversion alone, which needs no GPU."""
    gpu = torch.device("cuda", 0)
    two = Collectives(World(rank=0, size=2, local_size=2, device=gpu, backend="nccl"))
    model = nn.Sequential(nn.Linear(2, FEATURES), layer({}, torch.float32), nn.BatchNorm2d(3))
    keys = list(model.state_dict())
    converted = sync_batch_norm(model, two)
    assert [type(module) for module in converted.children()] == [nn.Linear, GatheredBatchNorm1d, nn.SyncBatchNorm]
    assert list(converted.state_dict()) == keys
    alone = sync_batch_norm(nn.Sequential(layer({}, torch.float32)), Collectives(World(device=gpu)))
    assert type(alone.get_submodule("0")) is nn.BatchNorm1d


class Sums(TorchDispatchMode):
    """Shapes of what is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "sum":
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_no_pass_over_the_rows_is_made_for_a_bias_before_batch_norm(*, training: bool) -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.train(training)
        model(batch(0, 30, 0.7)[0].float()).square().flatten().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with seeded("a bias"):
        plain = nn.Sequential(nn.Linear(FEATURES, 7), nn.BatchNorm1d(7))
    ours = zero_grad_of_biases_before_batchnorm(deepcopy(plain))
    expected = gradients(plain)
    with Sums() as seen:
        found = gradients(ours)
    assert ((30, 7) in seen.shapes) is (not training)
    assert list(found) == list(expected)
    if training:
        assert found["0.bias"].eq(0).all()
        del expected["0.bias"]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
