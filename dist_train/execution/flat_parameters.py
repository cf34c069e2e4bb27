"""All trainable parameters in one tensor, and whatever else has their shapes in tensors laid out alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

# Parameters begin at multiples of a cache line, so that kernels find them as they would in memory of their own.
_ALIGNMENT_BYTES = 64


class ParameterLayout(Protocol):
    """Where each trainable parameter stands in flat tensors of `size` numbers: gradients, moments, averages.

    A rank may hold only a part of each parameter. Between parameters are gaps of up to 64 bytes, which hold zeros.
    """

    parameters: list[nn.Parameter]
    size: int

    def zeros(self, *leading: int) -> Tensor:
        """Zeros for as many sets of numbers as `leading` says: (*leading, size)."""

    def offset_of(self, parameter: nn.Parameter) -> int:
        """Where a parameter begins."""

    def view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """What a flat tensor, (..., size), has for a parameter: (..., *shape of what this rank holds of it)."""

    def views(self, flat: Tensor) -> list[Tensor]:
        """What a flat tensor, (size,), has for each parameter, in their order."""

    def values_between(self, start: int, end: int) -> list[Tensor]:
        """The values of the parameters from one place to another, in as few tensors as they are in."""

    def cut(self, flat: Tensor, start: int, end: int) -> list[Tensor]:
        """A flat tensor from one place to another, cut as `values_between` are."""

    def whole(self, part: Tensor) -> Tensor:
        """What all ranks hold of a tensor with the shape of a parameter, on rank 0; called by all ranks."""

    def own(self, whole: Tensor) -> Tensor:
        """What this rank holds of a whole tensor with the shape of a parameter."""


LayOut = Callable[[Iterable[nn.Parameter]], ParameterLayout]
"""Makes the layout of parameters, in their order."""


class Places:
    """Numbers of parameters one after the other, each from a multiple of a cache line on: what layouts share.

    `shapes` are those of what this rank holds of each parameter.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], shapes: Sequence[torch.Size]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        self._dtype, self._device = first.dtype, first.device
        unit = _ALIGNMENT_BYTES // first.element_size()
        self._starts: dict[nn.Parameter, int] = {}
        self._shapes = dict(zip(self.parameters, shapes, strict=True))
        self.size = 0
        for parameter, shape in self._shapes.items():
            self._starts[parameter] = self.size
            self.size += -(-shape.numel() // unit) * unit

    def zeros(self, *leading: int) -> Tensor:
        """Zeros for as many sets of numbers as `leading` says: (*leading, size)."""
        return torch.zeros((*leading, self.size), dtype=self._dtype, device=self._device)

    def offset_of(self, parameter: nn.Parameter) -> int:
        """Where a parameter begins."""
        return self._starts[parameter]

    def view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """The part of a flat tensor, (..., size), that belongs to a parameter: (..., *shape)."""
        start, shape = self._starts[parameter], self._shapes[parameter]
        part: Tensor = flat[..., start : start + shape.numel()].unflatten(-1, shape)
        return part

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor, (size,), that belong to the parameters, in their order."""
        return [self.view(flat, parameter) for parameter in self.parameters]


class FlatParameters(Places):
    """Moves parameters into one tensor, `values`; each becomes a view of it.

    What works on all of them at once (norm, AdamW) then is one kernel, and not one or several for each parameter.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        found = list(parameters)
        super().__init__(found, [parameter.shape for parameter in found])
        self.values = self.zeros()
        for parameter in self.parameters:
            parameter.data = self.view(self.values, parameter).copy_(parameter.data)

    def values_between(self, start: int, end: int) -> list[Tensor]:
        """One tensor."""
        return [self.values[start:end]]

    def cut(self, flat: Tensor, start: int, end: int) -> list[Tensor]:
        """One tensor."""
        return [flat[start:end]]

    def whole(self, part: Tensor) -> Tensor:
        """The tensor itself: each rank has all of it."""
        return part

    def own(self, whole: Tensor) -> Tensor:
        """The tensor itself."""
        return whole
