"""The learning rate as a pure function of the step and of how often it was reduced, which a checkpoint holds."""

from __future__ import annotations

from typing import Literal

from dist_train.determinism.arithmetic import Arithmetic


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    min_ratio: float,
    name: Literal["cosine", "constant", "plateau"] = "cosine",
    reductions: int = 0,
    factor: float = 1.0,
    arithmetic: Arithmetic | None = None,
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Linear from peak / warmup_steps to the peak over the first `warmup_steps`. Then, by `name`: a half cosine
    (Loshchilov and Hutter 2017, "SGDR") that would reach peak * min_ratio at `total_steps`, and steps beyond stay
    there; the peak; or the peak times `factor` for each of the `reductions` so far, not below peak * min_ratio. Cosine
    and powers are those of `arithmetic`, Python's unless another is given.
    """
    arithmetic = arithmetic or Arithmetic()
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if name == "constant":
        return peak
    if name == "plateau":
        return peak * max(min_ratio, arithmetic.power(factor, reductions))
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * (1 + arithmetic.cosine_of_turns(progress / 2)) / 2)
