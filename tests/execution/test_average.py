"""The moving average against torch's AveragedModel, whose checkpoints it reads and writes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.determinism.keyed_random import seeded
from dist_train.execution.average import MovingAverage
from dist_train.execution.flat_parameters import FlatParameters


def network() -> nn.Module:
    """Parameters of sizes that no vector register divides, one of them frozen, and buffers."""
    with seeded("average"):
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    model[2].bias.requires_grad_(False)  # type: ignore[union-attr]
    return model


def follow(model: nn.Module, decay: float, *, warm_up: bool = False) -> MovingAverage:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return MovingAverage(deepcopy(model), model, FlatParameters(reversed(parameters)), decay, warm_up=warm_up)


def move(model: nn.Module, number: int) -> None:
    """Other weights and statistics."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        model[1].running_mean.fill_(number)  # type: ignore[union-attr,operator,index]
        model[1].num_batches_tracked.add_(1)  # type: ignore[union-attr,operator,index]


@pytest.mark.parametrize("finite", [True, torch.tensor(True)], ids=["the host's number", "a number on the device"])
@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_it_has_the_bits_and_the_state_of_torchs_averaged_model(decay: float, finite: Any) -> None:
    model = network()
    ours, theirs = follow(model, decay), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for number in range(6):
        move(model, number)
        ours.update(finite)
        theirs.update_parameters(model)
        state, expected = ours.state_dict(), theirs.state_dict()
        assert list(state) == list(expected)
        for name, value in expected.items():
            assert state[name].dtype == value.dtype
            assert torch.equal(state[name], value), name


def test_checkpoints_of_torchs_averaged_model_are_read() -> None:
    """Earlier releases wrote them."""
    model = network()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for number in range(3):
        move(model, number)
        theirs.update_parameters(model)
    ours = follow(model, 0.5)
    ours.load_state_dict(theirs.state_dict())
    move(model, 9)
    ours.update(True)
    theirs.update_parameters(model)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({"n_averaged": torch.tensor(1)})
    with pytest.raises(KeyError, match="n_averaged"):
        ours.load_state_dict({f"module.{name}": value for name, value in model.state_dict().items()})


@pytest.mark.parametrize("warm_up", [False, True])
def test_the_weight_of_an_update_is_the_same_number_on_the_device(*, warm_up: bool) -> None:
    average = follow(network(), 0.9, warm_up=warm_up)
    for updates in range(200):
        average._updates.fill_(updates)
        assert average._weight_on_device().item() == average._weight(updates)


@pytest.mark.parametrize("kind", [bool, torch.tensor])
def test_a_step_that_was_not_finite_leaves_it_as_it_was(kind: Any) -> None:
    model = network()
    average = follow(model, 0.5)
    move(model, 1)
    average.update(kind(True))
    before = {name: value.clone() for name, value in average.state_dict().items()}
    move(model, 2)
    model[1].running_mean.fill_(torch.nan)  # type: ignore[union-attr,operator,index]
    average.update(kind(False))
    for name, value in before.items():
        assert torch.equal(average.state_dict()[name], value), name


def test_an_average_that_is_warmed_up_forgets_where_it_began() -> None:
    """tf.train.ExponentialMovingAverage's decay with num_updates, in closed form."""
    model = nn.Linear(1, 1, bias=False).double()
    average, expected = follow(model, 0.9, warm_up=True), 0.0
    for update in range(200):
        value = 100.0 if update == 0 else float(update % 7)
        fill(model, value)
        average.update(True)
        decay = min(0.9, (1 + update) / (10 + update)) if update else 0.0
        expected = decay * expected + (1 - decay) * value
        assert weight(average) == pytest.approx(expected, abs=1e-12)
    warm, cold = [one_of_a_jump(warm_up=warm_up) for warm_up in (True, False)]
    assert weight(warm) < 1e-9
    assert weight(cold) > 0.2


def one_of_a_jump(*, warm_up: bool) -> MovingAverage:
    """The average of a weight that is 1 at the first update and 0 from then on."""
    model = nn.Linear(1, 1, bias=False).double()
    average = follow(model, 0.999, warm_up=warm_up)
    for update in range(1420):
        fill(model, float(update == 0))
        average.update(True)
    return average


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def weight(average: MovingAverage) -> float:
    found: Tensor = average.state_dict()["module.weight"]
    return found.item()
