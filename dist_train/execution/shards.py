"""Parameters of which each rank holds a run of rows, as torch's `fully_shard` leaves them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_train.distributed.collectives import Collectives
from dist_train.execution.flat_parameters import Places

_ROWS_AT_ONCE = {"cpu": 64, "cuda": 256}
"""Rows of one forward pass in evaluation."""


def rows_of(whole: Tensor, collectives: Collectives) -> Tensor:
    """The rows of a whole tensor, (rows, ...), that this rank holds: those of torch.chunk."""
    per_rank = -(-len(whole) // collectives.size)
    return whole[collectives.rank * per_rank : (collectives.rank + 1) * per_rank]


class LocalShards(Places):
    """A layout of what this rank holds of each parameter, which stays where `fully_shard` has put it."""

    def __init__(self, parameters: Iterable[nn.Parameter], collectives: Collectives) -> None:
        found = list(parameters)
        shards = [local(parameter) for parameter in found]
        super().__init__(found, [shard.shape for shard in shards])
        self._shards = dict(zip(found, shards, strict=True))
        self._collectives = collectives

    def _between(self, start: int, end: int) -> list[nn.Parameter]:
        # The fused kernel takes no tensors without numbers.
        return [p for p in self.parameters if start <= self.offset_of(p) < end and self._shards[p].numel()]

    def values_between(self, start: int, end: int) -> list[Tensor]:
        """The shards, one by one."""
        return [self._shards[parameter] for parameter in self._between(start, end)]

    def cut(self, flat: Tensor, start: int, end: int) -> list[Tensor]:
        """What belongs to each shard."""
        return [self.view(flat, parameter) for parameter in self._between(start, end)]

    def whole(self, part: Tensor) -> Tensor:
        """The rows of all ranks, on the CPU of rank 0; no rows on the others."""
        return gathered(part, self._collectives)

    def own(self, whole: Tensor) -> Tensor:
        """The rows of this rank."""
        return rows_of(whole, self._collectives)


class ShardedModel(nn.Module):
    """What a model is besides, once `hold_in_shards` has made it one: its parts are computed by all ranks together.

    Its state_dict is whole, on the CPU of rank 0, and gathered one tensor at a time; other ranks get no rows of each
    tensor. `load_state_dict` takes whole tensors on every rank. Both, and the model itself, are called by all ranks.
    """

    collective = True
    collectives: Collectives

    def __call__(self, *inputs: Tensor) -> Any:
        """The model's output; in evaluation ranks may have different numbers of rows, also none."""
        if torch.is_grad_enabled():
            return super().__call__(*inputs)
        # Each forward pass gathers parameters: all ranks must take the same number of them.
        rows = self.collectives.all_gather(torch.tensor(len(inputs[0])))
        at_once = _ROWS_AT_ONCE[self.collectives.device.type]
        passes = max(1, -(-int(rows.max()) // at_once))
        parts = [tuple(x[i * at_once : (i + 1) * at_once] for x in inputs) for i in range(passes)]
        return torch.cat([super(ShardedModel, self).__call__(*part) for part in parts])

    def state_dict(self, *arguments: Any, **settings: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        """Whole tensors on rank 0."""
        return self._whole(super().state_dict(*arguments, **settings))

    def unsaved_state_dict(self) -> dict[str, Tensor]:
        """What the state_dict of the model leaves out, whole on rank 0."""
        unsaved: Callable[[], Mapping[str, Tensor]] | None = getattr(super(), "unsaved_state_dict", None)
        return self._whole(unsaved()) if unsaved else {}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ARG002
        """Take over whole tensors. Raises RuntimeError where names or shapes differ."""
        wanted = super().state_dict()
        differing = [*(name for name in wanted if name not in state), *(name for name in state if name not in wanted)]
        if differing:
            raise RuntimeError(f"the parameters differ: {differing[0]} is in one of the two alone")
        for name, held in wanted.items():
            whole = state[name]
            if whole.shape != held.shape:
                raise RuntimeError(f"{name}: the shape is {tuple(held.shape)}, was {tuple(whole.shape)}")
            if isinstance(held, DTensor):
                local(held).copy_(rows_of(whole, self.collectives))
            else:
                held.copy_(whole)

    def _whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Rank 0: whole tensors; the other ranks: none of their rows."""
        return {
            name: gathered(local(value), self.collectives) if isinstance(value, DTensor) else value
            for name, value in state.items()
        }


def gathered(part: Tensor, collectives: Collectives) -> Tensor:
    """The rows of all ranks, on the CPU of rank 0; no rows on the others."""
    rows = collectives.gather_rows(part)
    return part[:0] if rows is None else rows


@torch.no_grad()
def local(parameter: Tensor) -> Tensor:
    """The memory in which this rank holds its part of a sharded parameter."""
    assert isinstance(parameter, DTensor)
    part: Tensor = parameter.to_local()
    return part
