"""Memory in large pages, for what is gone through again and again."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64
_LARGE_PAGE_BYTES = 1 << 21


class Arena:
    """Hands out `num_tensors` tensors, of `num_numbers` in all, from one piece of memory in large pages.

    In pages of 4 KiB, a step of some hundred rows touches more of them than a processor keeps track of. Where the
    kernel gives no large pages it is memory like any other; what is not touched takes none.
    """

    def __init__(self, num_numbers: int, num_tensors: int, dtype: torch.dtype) -> None:
        self._unit = _ALIGNMENT_BYTES // dtype.itemsize
        size = (num_numbers + num_tensors * self._unit) * dtype.itemsize
        memory = mmap.mmap(-1, size + _LARGE_PAGE_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._numbers = torch.frombuffer(memory, dtype=dtype)
        self._used = 0

    def empty(self, rows: int, width: int) -> Tensor:
        """A tensor of (rows, width), with whatever is in it."""
        start = self._used
        self._used += -(-rows * width // self._unit) * self._unit
        return self._numbers[start : start + rows * width].view(rows, width)
