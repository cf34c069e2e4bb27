"""Notices numbers in memory that have changed while nobody wrote to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class RestingMemory:
    """Checksums of tensors that rest between two steps, by what messages call them."""

    def __init__(self, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        self._tensors = tensors
        self._noted: dict[str, list[int]] | None = None

    def note(self) -> None:
        """The tensors are as they ought to be, and rest from now on."""
        self._noted = self._checksums()

    def forget(self) -> None:
        """Somebody is going to write to the tensors."""
        self._noted = None

    def changed(self) -> list[str]:
        """What has changed since it was noted; nothing where nothing is noted."""
        if self._noted is None:
            return []
        now = self._checksums()
        return [name for name, sums in self._noted.items() if now[name] != sums]

    def _checksums(self) -> dict[str, list[int]]:
        return {name: [checksum(tensor) for tensor in of_name] for name, of_name in self._tensors.items()}


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, or of its 64-bit words modulo 2**64: a bit that flips changes it.

    It takes as long as the tensor takes to come from memory.
    """
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view(torch.int64) if flat.nbytes % 8 == 0 else flat.view(torch.uint8)
    return int(words.sum())
