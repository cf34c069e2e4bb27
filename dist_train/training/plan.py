"""What a run is going to do, worked out before it does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_train.distributed.world import World

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of a run, without memory and speed: those are measured by a dry run."""

    world: World
    virtual_ranks: int | None
    rows: dict[str, int]
    class_names: list[str]
    num_inputs: int
    parameters: int
    trainable: int
    global_batch_size: int
    accumulation_steps: int
    steps_per_epoch: int
    total_steps: int
    learning_rate: Callable[[int], float]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    """What the columns of the data became, in lines."""

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        world = self.world
        share = -(-self.global_batch_size // self.accumulation_steps // world.size)
        exact = f", {self.virtual_ranks} virtual ranks" if self.virtual_ranks else ""
        ranks = f"{world.size} rank{'s' * (world.size > 1)}"
        yield f"world      {ranks} on {world.device.type}, backend {world.backend}{exact}"
        yield "rows       " + ", ".join(f"{name} {count:,}" for name, count in self.rows.items())
        yield f"classes    {', '.join(self.class_names)}; {self.num_inputs} input features"
        yield from self.inputs
        yield f"model      {self.parameters:,} parameters, {self.trainable:,} of them trainable"
        yield (
            f"steps      {self.total_steps:,} of {self.global_batch_size:,} rows ({self.steps_per_epoch:,} an epoch); "
            f"a rank works on at most {share:,} rows at a time"
        )
        yield f"rate       {self._curve()}"
        if self.chosen:
            yield "auto       " + ", ".join(f"{key}={value}" for key, value in self.chosen.items())

    def _curve(self, width: int = 30) -> str:
        last = self.total_steps - 1
        rates = [self.learning_rate(round(last * i / (width - 1))) for i in range(width)]
        peak = max(self.learning_rate(step) for step in range(0, last + 1, 1 + last // 10_000))
        bars = "".join(_BARS[round(rate / peak * (len(_BARS) - 1))] for rate in rates)
        return f"{bars}  first {rates[0]:.2e}, peak {peak:.2e}, last {rates[-1]:.2e}"
