"""Randomness as a function: every number depends on a key, never on what was drawn before.

Nothing has to be stored in a checkpoint or replayed on resume, and any rank can compute any number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Key = int | str

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): increment; shifts and
# multipliers.
INCREMENT = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


@lru_cache(maxsize=1024, typed=True)
def derive(*key: Key) -> int:
    """A 64-bit number, signed as torch.int64 is, that is a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def permutation(num_rows: int, *key: Key) -> Tensor:
    """A random order of `num_rows` rows, int64 on the CPU."""
    generator = torch.Generator().manual_seed(derive("permutation", *key))
    return torch.randperm(num_rows, generator=generator)


@contextmanager
def seeded(*key: Key) -> Iterator[None]:
    """Code inside that draws from torch's global CPU generator (initialisers) draws as a function of the key."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the generators of the GPUs as well, and nothing puts those back.
        torch.default_generator.manual_seed(derive("seeded", *key))
        yield


def mix(counter: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: int64 counters -> 64 random bits each; the same bits on every device."""
    if counter.device.type == "cpu":
        # numpy has unsigned numbers, and so needs no mask after a shift: half the time.
        words = counter.numpy().view(np.uint64)
        for shift, multiplier in ROUNDS:
            words ^= words >> np.uint64(shift)
            words *= np.uint64(multiplier)
        words ^= words >> np.uint64(LAST_SHIFT)
        return counter
    for shift, multiplier in ROUNDS:
        counter ^= _logical_shift(counter, shift)
        counter *= _signed(multiplier)
    counter ^= _logical_shift(counter, LAST_SHIFT)
    return counter


def uniform_keys(num_rows: int, *key: Key, first_row: int = 0) -> Tensor:
    """64 random bits for each of `num_rows` rows from `first_row` on: a row's bits depend on its number alone.

    No two rows have the same bits.
    """
    return mix(_counters(num_rows) + _signed(derive("rows", *key) + first_row * INCREMENT))


class RowRandom:
    """Random bits for rows, keyed by seed, purpose, epoch and the row's place in the epoch.

    A row gets the same bits on whichever rank it is computed, and however the batch is cut.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sequences: dict[torch.device, Tensor] = {}

    def counter(self, purpose: str, width: int, epoch: int, row: int) -> int:
        """First SplitMix64 counter of the bits of row `row` of an epoch, `width` int16 numbers a row."""
        return _signed(derive(purpose, self._seed, epoch) + row * _words(width) * INCREMENT)

    def distance(self, width: int, rows: int) -> int:
        """What to add to a counter to come to the row that is `rows` further."""
        return _signed(rows * _words(width) * INCREMENT)

    def bits16(self, counter: int | Tensor, num_rows: int, width: int, device: torch.device) -> Tensor:
        """Uniform int16 numbers of `num_rows` rows from `counter` on, (num_rows, width)."""
        words = _words(width)
        counters = self._sequence(num_rows * words, device) + counter
        return mix(counters).view(torch.int16).view(num_rows, 4 * words)[:, :width]

    def bits16_of_tokens(
        self, counter: int, num_rows: int, num_tokens: int, width: int, max_tokens: int, device: torch.device
    ) -> Tensor:
        """As `bits16` for rows of `max_tokens` rows of `width` each, of which the first `num_tokens` are wanted.

        (num_rows, num_tokens, width).
        """
        words = _words(width)
        of_rows = _counters(num_rows) * (max_tokens * words) + counter
        counters = of_rows.to(device).unsqueeze(1) + self._sequence(num_tokens * words, device)
        return mix(counters).view(torch.int16).view(num_rows, num_tokens, 4 * words)[:, :, :width]

    @property
    def sequences(self) -> list[Tensor]:
        """Memory that `bits16` reads. Whoever records its kernels has to keep a reference: a longer one replaces it."""
        return list(self._sequences.values())

    def _sequence(self, count: int, device: torch.device) -> Tensor:
        """The first counters of a sequence; it is kept, and made anew when a longer one is asked for."""
        if device not in self._sequences or len(self._sequences[device]) < count:
            self._sequences[device] = _counters(count).to(device)
        return self._sequences[device][:count]


def _words(width: int) -> int:
    """64-bit words of a row of `width` 16-bit numbers."""
    return -(-width // 4)


def _counters(count: int) -> Tensor:
    return torch.arange(count) * _signed(INCREMENT)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number
