"""All trainable parameters in one tensor, and whatever else has their shapes in tensors laid out alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Parameters begin at multiples of a cache line, so that kernels find them as they would in memory of their own.
_ALIGNMENT_BYTES = 64


class FlatParameters:
    """Moves parameters into one tensor, `values`; each becomes a view of it.

    What works on all of them at once (norm, AdamW) then is one kernel, and not one or several for each parameter.
    Between parameters are gaps of up to 64 bytes, which hold zeros.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        unit = _ALIGNMENT_BYTES // first.element_size()
        self._starts: dict[nn.Parameter, int] = {}
        self.size = 0
        for parameter in self.parameters:
            self._starts[parameter] = self.size
            self.size += -(-parameter.numel() // unit) * unit
        self.values = self.zeros()
        for parameter in self.parameters:
            parameter.data = self.view(self.values, parameter).copy_(parameter.data)

    def zeros(self, *leading: int) -> Tensor:
        """Zeros for as many sets of numbers as `leading` says: (*leading, size)."""
        first = self.parameters[0]
        return torch.zeros((*leading, self.size), dtype=first.dtype, device=first.device)

    def offset_of(self, parameter: nn.Parameter) -> int:
        """Where a parameter begins."""
        return self._starts[parameter]

    def view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """The part of a flat tensor, (..., size), that belongs to a parameter: (..., *shape)."""
        start = self._starts[parameter]
        part: Tensor = flat[..., start : start + parameter.numel()].unflatten(-1, parameter.shape)
        return part

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor, (size,), that belong to the parameters, in their order."""
        return [self.view(flat, parameter) for parameter in self.parameters]
