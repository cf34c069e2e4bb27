"""Texts as token ids: held without padding, padded batch by batch."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_train.data.sampler import MicroBatchIndices
from dist_train.data.sources import Batch, Gathered


@dataclass(frozen=True)
class Tokens:
    """Token ids of all texts, one after the other, (tokens,) int32; text i has those from ends[i] to ends[i + 1].

    `ends` is (texts + 1,) int64. `cut` counts the texts that were longer than what was kept of them.
    """

    ids: Tensor
    ends: Tensor
    cut: int = 0

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, (texts,) int64."""
        return self.ends.diff()

    def select(self, rows: Tensor) -> Tokens:
        """The texts `rows`, (n,), in that order."""
        lengths = self.lengths[rows]
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        places = torch.arange(int(ends[-1])) + (self.ends[:-1][rows] - ends[:-1]).repeat_interleave(lengths)
        return Tokens(self.ids[places], ends)

    def pack(self) -> bytes:
        """As numpy writes arrays, without pickle."""
        stream = io.BytesIO()
        np.savez(stream, ids=self.ids.numpy(), ends=self.ends.numpy(), cut=np.int64(self.cut))
        return stream.getvalue()

    @classmethod
    def unpack(cls, data: bytes) -> Tokens:
        """What `pack` wrote. Raises ValueError or KeyError on anything else, and OSError."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["ends"]), int(arrays["cut"]))


@dataclass(frozen=True)
class Padding:
    """How texts that are computed together are padded: with `pad_id` to the longest of them.

    The width is rounded up to a multiple of `multiple`, but is at most `max_tokens`, the most that a text has.
    """

    pad_id: int
    multiple: int
    max_tokens: int

    def padded(self, lengths: Tensor) -> Tensor:
        """Width of each text by itself, of their lengths, both (n,) int64 on the CPU."""
        return (-(-lengths.clamp(min=1) // self.multiple) * self.multiple).clamp(max=self.max_tokens)

    def width(self, lengths: Tensor) -> int:
        """Width of texts with these lengths, (n,) on the CPU; that of one token where there are none."""
        return int(self.padded(lengths.max() if len(lengths) else torch.ones((), dtype=torch.int64)))


class TokenRows:
    """Tokenized texts of a split, on the host; a batch is padded when it is gathered.

    A batch's inputs are token ids, (rows, width) int64 on the device, and lengths, (rows,) int64 on the host: a model
    that asks for the longest of some rows does not wait for the device.
    """

    on_device = False
    mapped_bytes = 0
    table = None
    weights = None

    def __init__(
        self, tokens: Tokens, targets: Tensor, row_numbers: Tensor, device: torch.device, padding: Padding
    ) -> None:
        self.tokens = tokens
        self.row_numbers = row_numbers
        self._targets = targets
        self._device = device
        self._padding = padding

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (rows,) int64 on the CPU."""
        return self.tokens.lengths

    @property
    def padded_lengths(self) -> Tensor:
        """The same with padding, of each row by itself."""
        return self._padding.padded(self.lengths)

    @property
    def targets(self) -> Tensor:
        """Class indices of all rows, (rows,) int64 on the device."""
        return self._targets.to(self._device)

    def slice(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Inputs of the rows from `start` to `stop`."""
        return self.inputs(torch.arange(start, min(stop, len(self))))

    def gather(self, share: MicroBatchIndices) -> Batch:
        """The batch of a share."""
        return Batch(self, share, share.rows)

    def read(self, index: Tensor) -> Gathered:
        """The rows at the places `index`, (n,)."""
        return Gathered(self.inputs(index), self._targets[index].to(self._device), None)

    def inputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the rows at the places `index`, (n,)."""
        starts = self.tokens.ends[:-1][index]
        lengths = self.tokens.ends[1:][index] - starts
        columns = torch.arange(self._padding.width(lengths))
        inside = columns < lengths.unsqueeze(1)
        places = (starts.unsqueeze(1) + columns).clamp_(max=max(0, len(self.tokens.ids) - 1))
        ids = torch.where(inside, self.tokens.ids[places].long(), self._padding.pad_id)
        return ids.to(self._device), lengths
