"""Notices numbers in memory that have changed while nobody wrote to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RestingMemory:
    """Checksums of tensors that rest between two steps, by what messages call them. The tensors stay where they are."""

    def __init__(self, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        self._words: dict[str, list[Any]] = {n: [words(t).numpy() for t in of_n] for n, of_n in tensors.items()}
        self._noted: dict[str, list[int]] | None = None

    def note(self) -> None:
        """The tensors are as they ought to be, and rest from now on."""
        self._noted = self._checksums()

    def changed(self) -> list[str]:
        """What has changed since it was noted; nothing where nothing is noted."""
        if self._noted is None:
            return []
        now = self._checksums()
        return [name for name, sums in self._noted.items() if now[name] != sums]

    def _checksums(self) -> dict[str, list[int]]:
        # The sum of all words modulo 2**64: a bit that flips changes it. It takes as long as memory takes to read.
        return {name: [int(np.add.reduce(own)) for own in of_name] for name, of_name in self._words.items()}


def words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as integers, flat, in as few as may be; the same memory where the tensor is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    begin = int(flat.storage_offset()) * flat.element_size()
    kinds = (kind for kind in (torch.int64, torch.int32) if (flat.nbytes | begin) % kind.itemsize == 0)
    return flat.view(next(kinds, torch.uint8))
