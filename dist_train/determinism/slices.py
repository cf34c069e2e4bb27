"""The slices of a micro-batch: contiguous runs of its rows, each computed on its own in the exact mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def split_slices(rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The rows of each slice, (length, ...), as a tensor of its own; one slice is `rows` itself.

    Several slices are copied: a kernel may round differently where a tensor begins at another place in memory, and
    where a slice begins depends on the world size.
    """
    if len(lengths) <= 1:
        return [rows]
    return [part.clone() for part in rows.split(list(lengths))]
