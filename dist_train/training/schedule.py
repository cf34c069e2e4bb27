"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Linear from peak / warmup_steps to the peak over the first `warmup_steps`, then a half cosine (Loshchilov and
    Hutter 2017, "SGDR") that would reach peak * min_ratio at `total_steps`; steps beyond stay there.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2)
