"""Randomness as a function: every number depends on a key, never on what was drawn before.

Nothing has to be stored in a checkpoint or replayed on resume, and any rank can compute any number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Key = int | str

# Bits are made for so many rows at a time where fewer are asked for, unless more than all but a few of them go unused.
_ROWS_AHEAD = 512
_SPARSE = 4

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): increment; shifts and
# multipliers.
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


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


def mix(counter: Tensor, room: Tensor | None = None) -> Tensor:
    """SplitMix64's finaliser, in place: int64 counters -> 64 random bits each; the same bits on every device.

    `room`, of the same shape, saves an allocation on the CPU.
    """
    if counter.device.type == "cpu":
        # numpy has unsigned numbers, and so needs no mask after a shift: half the time.
        words, shifted = (
            x.numpy().view(np.uint64) for x in (counter, torch.empty_like(counter) if room is None else room)
        )
        for shift, multiplier in _ROUNDS:
            np.bitwise_xor(words, np.right_shift(words, np.uint64(shift), out=shifted), out=words)
            np.multiply(words, np.uint64(multiplier), out=words)
        np.bitwise_xor(words, np.right_shift(words, np.uint64(_LAST_SHIFT), out=shifted), out=words)
        return counter
    for shift, multiplier in _ROUNDS:
        counter ^= _logical_shift(counter, shift)
        counter *= _signed(multiplier)
    counter ^= _logical_shift(counter, _LAST_SHIFT)
    return counter


def uniform_keys(num_rows: int, *key: Key, first_row: int = 0) -> Tensor:
    """64 random bits for each of `num_rows` rows from `first_row` on: a row's bits depend on its number alone.

    No two rows have the same bits.
    """
    return mix(_counters(num_rows) + _signed(derive("rows", *key) + first_row * _INCREMENT))


class _Ahead:
    """Bits of rows of an epoch from place `start` on; `asked_at` is the place that was last asked for."""

    __slots__ = ("asked_at", "bits", "epoch", "start")

    def __init__(self, epoch: int, start: int, bits: Tensor) -> None:
        self.epoch = epoch
        self.start = start
        self.bits = bits
        self.asked_at = start

    def has(self, epoch: int, first_row: int, num_rows: int) -> bool:
        """Whether these rows are among them."""
        return epoch == self.epoch and 0 <= first_row - self.start <= len(self.bits) - num_rows


class RowRandom:
    """Random bits for the rows of a batch, keyed by seed, purpose, epoch and the row's place in the epoch.

    `begin` says which rows are on the table; modules that share this object then draw their bits. A row gets the
    same bits on whichever rank it is computed, and however the batch is cut.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._epoch = 0
        self._first_row = 0
        self._counters: dict[torch.device, Tensor] = {}
        self._ahead: dict[tuple[str, int, torch.device], _Ahead] = {}
        self._room = torch.empty(0, dtype=torch.int64)
        self._held: dict[tuple[str, int], Tensor] | None = None

    def begin(self, epoch: int, first_row: int) -> None:
        """The rows that follow start at place `first_row` of the epoch's order."""
        self._epoch = epoch
        self._first_row = first_row

    def hold(self, keys: Sequence[tuple[str, int]], starts: Tensor) -> None:
        """From now on the bits of each of `keys`, (purpose, width), follow from a number in `starts`, (keys,) int64.

        Whoever fills `starts` with what `starts_of` says then decides for which rows the bits are, also when kernels
        that were recorded before are run again.
        """
        self._held = dict(zip(keys, starts.unbind(), strict=True))

    def let_go(self) -> None:
        """Bits follow from `begin` again."""
        self._held = None

    def keys_asked_for(self) -> list[tuple[str, int]]:
        """Purpose and width of all bits that were asked for so far."""
        return [(purpose, width) for purpose, width, _ in self._ahead]

    def starts_of(self, keys: Sequence[tuple[str, int]]) -> list[int]:
        """What the bits of `keys` for the rows on the table follow from."""
        return [self._start(purpose, -(-width // 4)) for purpose, width in keys]

    def bits16(self, purpose: str, num_rows: int, width: int, device: torch.device) -> Tensor:
        """Uniform int16 numbers of shape (num_rows, width), good until bits of this purpose are asked for again.

        When rows are asked for in small portions, one after the other, more are made than were asked for, and kept.
        """
        if self._held is not None:
            return self._make(self._held[purpose, width], num_rows, width, device)[:, :width]
        key = (purpose, width, device)
        ahead = self._ahead.get(key)
        if ahead is None or not ahead.has(self._epoch, self._first_row, num_rows):
            # A rank that takes a small part of each batch would make many rows that are not its own.
            follows = ahead is not None and ahead.epoch == self._epoch and ahead.start < self._first_row
            dense = follows and ahead is not None and self._first_row - ahead.asked_at <= _SPARSE * num_rows
            num_made = max(num_rows, _ROWS_AHEAD) if dense else num_rows
            memory = None if ahead is None else ahead.bits
            bits = self._make(self._start(purpose, -(-width // 4)), num_made, width, device, memory)
            ahead = self._ahead[key] = _Ahead(self._epoch, self._first_row, bits)
        ahead.asked_at = self._first_row
        start = self._first_row - ahead.start
        return ahead.bits[start : start + num_rows, :width]

    def _start(self, purpose: str, words: int) -> int:
        return _signed(derive(purpose, self._seed, self._epoch) + self._first_row * words * _INCREMENT)

    def _make(
        self, start: int | Tensor, num_rows: int, width: int, device: torch.device, memory: Tensor | None = None
    ) -> Tensor:
        """Bits of whole words, (num_rows, at least width) int16; in `memory`, if there is enough of it."""
        words = -(-width // 4)
        counters = self._first_counters(num_rows * words, device)
        if memory is None or memory.numel() < 4 * len(counters):
            memory = torch.empty((num_rows, 4 * words), dtype=torch.int16, device=device)
        bits = memory[:num_rows]
        torch.add(counters, start, out=bits.view(torch.int64).view(-1))
        mix(bits.view(torch.int64).view(-1), self._room_for(counters))
        return bits

    def _room_for(self, counters: Tensor) -> Tensor | None:
        """Room for what `mix` needs on the CPU, kept from one call to the next."""
        if counters.device.type != "cpu":
            return None
        if len(self._room) < len(counters):
            self._room = torch.empty_like(counters)
        return self._room[: len(counters)]

    def _first_counters(self, count: int, device: torch.device) -> Tensor:
        """The first counters of a sequence that is kept, and made anew when a longer one is asked for."""
        if device not in self._counters or len(self._counters[device]) < count:
            self._counters[device] = _counters(count).to(device)
        return self._counters[device][:count]


def _counters(count: int) -> Tensor:
    return torch.arange(count) * _signed(_INCREMENT)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number
