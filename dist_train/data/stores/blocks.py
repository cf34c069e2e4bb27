"""The blocks of a store in the making: written by several ranks, each recorded once it is on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_train.data.splits.split import SPLITS
from dist_train.data.stores.prepare import Block, Fitted
from dist_train.data.stores.store import read_block, row_bytes, tensor_files

Records = dict[tuple[str, int], dict[str, str]]
"""SHA-256 of each tensor of a block, by split and number of the block."""


class Blocks:
    """The files of a store in `folder`; in `records` each rank keeps a list of the blocks that it has written."""

    def __init__(self, folder: Path, records: Path, fitted: Fitted) -> None:
        self._folder = folder
        self._records = records
        self._num_rows = fitted.num_rows
        self._block_rows = fitted.block_rows
        files = tensor_files(fitted.spec, weighted=fitted.weighted)
        self._row_bytes = {name: row_bytes(dtype, width) for name, (dtype, width) in files.items()}

    def create(self) -> None:
        """Make the files in their full size; what is in them stays."""
        for split in SPLITS:
            for name, size in self._row_bytes.items():
                with (self._folder / f"{split}.{name}").open("ab") as stream:
                    stream.truncate(self._num_rows[split] * size)

    def read(self) -> Records:
        """The blocks that former commands have written."""
        records: Records = {}
        for file in sorted(self._records.glob("*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    split, number, sha256 = json.loads(line)
                except ValueError:
                    continue  # the last line of a command that was killed
                records[split, number] = sha256
        return records

    def check(self, recorded: Iterable[tuple[tuple[str, int], dict[str, str]]], sound: Records) -> Iterator[int]:
        """Put those blocks into `sound` that are on disk as they are recorded; yields 1 for each that was looked at."""
        for (split, number), sha256 in recorded:
            first = number * self._block_rows
            last = min(first + self._block_rows, self._num_rows[split])
            found = {
                name: hashlib.sha256(read_block(self._folder / f"{split}.{name}", size, first, last)).hexdigest()
                for name, size in self._row_bytes.items()
            }
            if found == sha256:
                sound[split, number] = sha256
            yield 1

    @contextmanager
    def writing(self, rank: int, made: Records) -> Iterator[Callable[[Block], None]]:
        """Yields a function that writes a block, waits until it is on disk, and records it; in `made` too."""
        with ExitStack() as stack:
            files = {
                f"{split}.{name}": stack.enter_context((self._folder / f"{split}.{name}").open("r+b", buffering=0))
                for split in SPLITS
                for name in self._row_bytes
            }
            record = stack.enter_context((self._records / f"{rank:06d}.jsonl").open("ab", buffering=0))

            def write(block: Block) -> None:
                for name, data in block.data.items():
                    file = files[f"{block.split}.{name}"].fileno()
                    _write_at(file, data, block.number * self._block_rows * self._row_bytes[name])
                    os.fdatasync(file)
                made[block.split, block.number] = block.sha256
                record.write(json.dumps([block.split, block.number, block.sha256]).encode() + b"\n")

            yield write


def _write_at(file: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written
