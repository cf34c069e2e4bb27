"""How a CSV file is written: its separator, encoding, compression and the lines above its header; and a stream of it.

What is not plain (commas, UTF-8, uncompressed, a header in the first line) is recognised and said in a log line.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from dist_train.errors import UserError
from dist_train.system.console import log

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
CSV_SUFFIXES = (".csv", ".tsv")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Bytes that the separator is found in, and records of them.
_SAMPLE_BYTES = 1 << 16
_SAMPLE_RECORDS = 50
_BLOCK_BYTES = 1 << 22
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_LATIN, LATIN_NAME = "cp1252", "Windows-1252 (Latin-1)"


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written; `skipped` lines stand above the header."""

    separator: str = ","
    encoding: str = "utf-8"
    skipped: int = 0


def is_csv_name(file: Path) -> bool:
    """Whether a file is CSV by its name, which may end in .gz, .zst or .bz2 as well."""
    return ends_in(file, CSV_SUFFIXES)


def ends_in(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether the name of a file, in lower case and without the suffix of a compression, ends in one of `suffixes`."""
    name = file.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return name.endswith(suffixes)


@contextmanager
def opened_csv(file: Path, convert: pyarrow.csv.ConvertOptions | None = None) -> Iterator[Any]:
    """Arrow's reader of the batches of a CSV file.

    A row with a cell too few or too many is an error of Arrow, and so are bytes that are not of the encoding.
    """
    found = file.stat()
    dialect = _dialect_of(file, found.st_size, found.st_mtime_ns)
    # One thread: only then does Arrow name the row in which it stumbles.
    read = pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, skip_rows=dialect.skipped)
    parse = pyarrow.csv.ParseOptions(delimiter=dialect.separator, newlines_in_values=True)
    with (
        opened_bytes(file) as stream,
        pyarrow.csv.open_csv(
            _Utf8(stream, file, dialect.encoding), read_options=read, parse_options=parse, convert_options=convert
        ) as reader,
    ):
        yield reader


@lru_cache(maxsize=1024)
def _dialect_of(file: Path, _size: int, _modified_ns: int) -> Dialect:
    """Found in the beginning of the file, and said where it is not the plain one."""
    with opened_bytes(file) as stream:
        beginning = stream.read(_SAMPLE_BYTES)
    encoding = _MARKS.get(beginning[:2], "utf-8")
    if b"\0" in beginning and encoding == "utf-8":
        raise UserError(f"{file}: is no text: it holds zero bytes")
    # A broken UTF-16 is an error here; the stream decodes what is not UTF-8.
    decoder = codecs.getincrementaldecoder(encoding)("replace" if encoding == "utf-8" else "strict")
    text = decoder.decode(beginning).removeprefix("\ufeff")
    whole = len(beginning) < _SAMPLE_BYTES
    lines = text.splitlines(keepends=True)
    lines = lines if whole else lines[:-1] or lines
    separator, skipped = _above_the_header(lines)
    separator = separator or _separator_of(lines[skipped:])
    if separator != ",":
        log.info("%s: its columns are separated by %s", file, _SEPARATORS[separator])
    if skipped:
        log.info("%s: the first %d lines are no part of the table: they are skipped", file, skipped)
    if encoding != "utf-8":
        log.info("%s: is written in UTF-16", file)
    return Dialect(separator, encoding, skipped)


def _above_the_header(lines: list[str]) -> tuple[str | None, int]:
    """The separator that a line `sep=;` of Excel names, and the number of lines above the header."""
    if lines and lines[0].lower().startswith("sep=") and lines[0].strip()[4:] in ("", *_SEPARATORS):
        return lines[0].rstrip("\r\n")[4:] or None, 1
    comments = next((index for index, line in enumerate(lines) if not line.startswith("#")), 0)
    # A header may itself begin with `#`; then its line has as many separators as those below.
    fewest = min((_most_separators(line) for line in lines[:comments]), default=0)
    is_header = comments == 1 and fewest == _most_separators(lines[1])
    return None, 0 if is_header else comments


def _most_separators(line: str) -> int:
    return max(line.count(separator) for separator in _SEPARATORS)


def _separator_of(lines: list[str]) -> str:
    """The one that cuts all records of the sample into as many cells as the header has, two or more; else a comma."""
    header = lines[0] if lines else ""
    candidates = [separator for separator in _SEPARATORS if separator in header]
    if candidates in ([], [","]):
        return ","
    cells = {separator: _cells(lines, separator) for separator in candidates}
    even = [separator for separator in candidates if len(set(cells[separator])) == 1 and cells[separator][0] > 1]
    if even:
        return max(even, key=lambda separator: cells[separator][0])
    return "," if "," in candidates else candidates[0]


def _cells(lines: list[str], separator: str) -> list[int]:
    """Cells of each of the first records that are not empty; none where the sample cannot be cut."""
    try:
        records = csv.reader(lines, delimiter=separator)
        counts = [len(record) for record in islice(records, _SAMPLE_RECORDS) if record]
    except csv.Error:
        return []
    # A cell in quotes may reach beyond the sample.
    return counts if len(counts) < 2 or len(counts) == _SAMPLE_RECORDS else counts[:-1] or counts


def opened_bytes(file: Path) -> Any:
    """The bytes of a file, or what its compression holds, as its name says."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    return pa.input_stream(str(file), compression=compression) if compression else file.open("rb")


class _Utf8(io.RawIOBase):
    """The bytes of a text file as UTF-8, with a line break at the end of a lone header, which Arrow takes for nothing.

    The first bytes beyond ASCII tell UTF-8 from Windows-1252, of which Latin-1 is a part.
    """

    def __init__(self, stream: Any, file: Path, encoding: str) -> None:
        self._stream = stream
        self._file = file
        self._certain = encoding != "utf-8"
        self._decoder = codecs.getincrementaldecoder(encoding)() if self._certain else None
        self._begun = False
        self._pending = b""

    def readable(self) -> bool:
        """As a file that is read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; none at the end."""
        if not self._pending:
            self._pending = self._next(size)
        if size < 0 or len(self._pending) <= size:
            data, self._pending = self._pending, b""
        else:
            data, self._pending = self._pending[:size], self._pending[size:]
        return data

    def _next(self, size: int) -> bytes:
        data = self._decoded(size)
        if not self._begun and b"\n" not in data:
            data += self._decoded(size) or b"\n"
        self._begun = True
        return data

    def _decoded(self, size: int) -> bytes:
        while True:
            data: bytes = self._stream.read(size)
            if not self._certain and not data.isascii():
                self._tell_encoding(data)
            if self._decoder is None:
                return data
            decoded = self._decoder.decode(data, not data).encode()
            if decoded or not data:
                return decoded

    def _tell_encoding(self, data: bytes) -> None:
        self._certain = True
        try:
            codecs.getincrementaldecoder("utf-8")().decode(data)
        except UnicodeDecodeError:
            self._decoder = codecs.getincrementaldecoder(_LATIN)()
            self._decoder.decode(data)  # an error for bytes that are no letters
            log.info(
                "%s: is not UTF-8: it is read as %s; if letters are wrong, save it as UTF-8", self._file, LATIN_NAME
            )
