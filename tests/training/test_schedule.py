"""The learning rate against torch's own schedulers and the closed form."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from dist_train.training.schedule import learning_rate

PEAK = 3e-3


@pytest.mark.parametrize(("warmup", "total", "ratio"), [(10, 100, 0.0), (7, 50, 0.1), (1, 20, 0.0), (100, 101, 0.5)])
def test_equals_torchs_linear_warm_up_and_cosine(warmup: int, total: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    schedulers = [
        LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(1, warmup - 1)),
        CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=PEAK * ratio),
    ]
    # Stepped by hand: SequentialLR calls what torch has deprecated.
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        if step + 1 == warmup:
            optimizer.param_groups[0]["lr"] = PEAK
        else:
            optimizer.step()
            schedulers[step >= warmup].step()
    ours = [learning_rate(s, peak=PEAK, warmup_steps=warmup, total_steps=total, min_ratio=ratio) for s in range(total)]
    assert ours == pytest.approx(rates, rel=1e-9, abs=1e-15)


def test_closed_form() -> None:
    def rate(step: int, **change: float) -> float:
        values = {"peak": 1.0, "warmup_steps": 10, "total_steps": 110, "min_ratio": 0.2} | change
        return learning_rate(step, **values)  # type: ignore[arg-type]

    assert [rate(0), rate(4), rate(9), rate(10)] == [0.1, 0.5, 1.0, 1.0]
    assert rate(60) == pytest.approx(0.6)
    assert rate(110) == rate(10**6) == pytest.approx(0.2)
    assert rate(35) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(0, warmup_steps=0) == 1.0
    assert rate(5, warmup_steps=10, total_steps=6) == 0.6  # a run that ends in its warm-up
    assert [rate(s) for s in (60, 3, 60)] == [rate(60), rate(3), rate(60)]  # nothing is remembered


def test_constant_and_plateau_follow_the_warm_up() -> None:
    def rate(step: int, name: Literal["constant", "plateau"], reductions: int = 0) -> float:
        return learning_rate(
            step,
            peak=1.0,
            warmup_steps=10,
            total_steps=50,
            min_ratio=0.05,
            name=name,
            reductions=reductions,
            factor=0.3,
        )

    assert [rate(s, "constant") for s in (0, 4, 9, 10, 49, 10**6)] == [0.1, 0.5, 1, 1, 1, 1]
    assert [rate(s, "plateau") for s in (0, 4, 9, 10, 49)] == [0.1, 0.5, 1, 1, 1]
    assert [rate(20, "plateau", count) for count in range(4)] == pytest.approx([1, 0.3, 0.09, 0.05])
