"""The scores of a file in the making: written aside, so that a process that was killed can be continued."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from polars.exceptions import PolarsError

from dist_train.data.encoding.unfamiliar import Unfamiliar
from dist_train.errors import UserError
from dist_train.system.files import TMP_PREFIX, sync_folder, write_atomically

_FORMAT = 2
_SECONDS_BETWEEN_RECORDS = 2.0


class PartialScores:
    """Scores of the first `rows` rows of a file, and the unfamiliar cells among them; the output once all are there.

    Beside the output lie `.partial-<number>` with the rows and `.partial-<number>.json`, the record of how many are
    whole. They are continued where `identity`, what the rows depend on, is that of the record; else begun anew. Rows of
    Parquet lie there as streams of Arrow, because a Parquet file cannot be continued; its row groups have
    `rows_of_group` rows.

    Raises:
        UserError: the output cannot be written, or another process is writing it.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], rows_of_group: int) -> None:
        self.output = output
        self._rows_of_group = rows_of_group
        self.rows = 0
        self.unfamiliar = Unfamiliar()
        self._target = behind_links(output)
        self._identity = {"format": _FORMAT, "output": str(self._target), **identity}
        name = hashlib.sha256(self._target.name.encode()).hexdigest()[:12]
        self.file = self._target.with_name(f"{TMP_PREFIX}{name}")
        self._record = self._target.with_name(f"{TMP_PREFIX}{name}.json")
        self._recorded = time.monotonic()
        try:
            self._stream = self._locked()
            self._continue()
        except OSError as error:
            raise unwritable(output, error) from None

    def _locked(self) -> IO[bytes]:
        while True:
            stream = self.file.open("ab")
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.close()
                raise UserError(f"{self.output}: another process is writing it") from None
            except OSError:
                return stream  # a file system without locks
            with suppress(FileNotFoundError):
                if os.fstat(stream.fileno()).st_ino == self.file.stat().st_ino:
                    return stream
            stream.close()  # another process has renamed it to its output meanwhile

    def _continue(self) -> None:
        size = self._stream.tell()
        try:
            found = json.loads(self._record.read_bytes())
            whole = found["identity"] == json.loads(json.dumps(self._identity)) and found["bytes"] <= size
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            self.rows = found["rows"]
            cells = found["unfamiliar"]
            self.unfamiliar = Unfamiliar(**{**cells, "never_missing": frozenset(cells["never_missing"])})
        self._stream.truncate(found["bytes"] if whole else 0)
        self._stream.seek(0, os.SEEK_END)

    def append(self, scores: pl.DataFrame, unfamiliar: Unfamiliar) -> None:
        """Add the rows that follow: whole groups, unless they are the last.

        UserError as the constructor, or where CSV has no form for a kept column.
        """
        try:
            self._stream.write(self._bytes_of(scores))
            self.rows += scores.height
            self.unfamiliar += unfamiliar
            if time.monotonic() - self._recorded >= _SECONDS_BETWEEN_RECORDS:
                self._note()
                self._recorded = time.monotonic()
        except OSError as error:
            raise unwritable(self.output, error) from None
        except PolarsError as error:
            raise UserError(f"{self.output}: cannot be written as CSV: {str(error).splitlines()[0]}") from None

    def _bytes_of(self, scores: pl.DataFrame) -> bytes:
        stream = BytesIO()
        if self._is_csv:
            scores.write_csv(stream, include_header=self._stream.tell() == 0)
            return stream.getvalue()
        for start in range(0, max(1, scores.height), self._rows_of_group):
            table = scores.slice(start, self._rows_of_group).to_arrow()
            with pyarrow.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
        return stream.getvalue()

    def _note(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        cells = asdict(self.unfamiliar) | {"never_missing": sorted(self.unfamiliar.never_missing)}
        content = {
            "identity": self._identity, "rows": self.rows, "bytes": self._stream.tell(), "unfamiliar": cells,
        }  # fmt: skip
        write_atomically(self._record, json.dumps(content).encode())

    def finish(self) -> None:
        """Rename the rows to the output. UserError as the constructor."""
        try:
            self._stream.flush()
            whole = self.file
            if not self._is_csv:
                self._note()  # if this is killed, no row is scored again
                whole = self.file.with_suffix(".parquet")
                self._write_parquet(whole)
            with whole.open("rb") as stream:
                os.fsync(stream.fileno())
            with suppress(FileNotFoundError):
                shutil.copymode(self._target, whole)
            whole.replace(self._target)
            sync_folder(self._target.parent)
            self.discard()
        except OSError as error:
            self.discard()
            raise unwritable(self.output, error) from None

    def _write_parquet(self, whole: Path) -> None:
        parts = self._parts()
        first = next(parts)
        with pyarrow.parquet.ParquetWriter(whole, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for part in parts:
                writer.write_table(part)

    def _parts(self) -> Iterator[pa.Table]:
        with self.file.open("rb") as stream:
            size = self._stream.tell()
            while stream.tell() < size:
                yield pyarrow.ipc.open_stream(stream).read_all()

    def discard(self) -> None:
        """Remove what lies aside."""
        with suppress(OSError):
            self._stream.close()
        for file in (self.file, self.file.with_suffix(".parquet"), self._record):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    @property
    def _is_csv(self) -> bool:
        return self.output.suffix.lower() == ".csv"


def require_writable(output: Path, kept: Mapping[str, Path]) -> None:
    """Refuse, before anything is computed, an output that cannot be written or must not be: one of `kept`.

    Raises:
        UserError: says why.
    """
    target = behind_links(output)
    for what, file in kept.items():
        with suppress(OSError):
            inside = file.is_dir() and file.resolve() in target.parents
            if inside or (target.exists() and target.samefile(file)):
                raise UserError(f"{output}: is {what} ({file}), which is not overwritten: name another file")
    try:
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise unwritable(output, error) from None
    try:
        aside = target.with_name(f"{TMP_PREFIX}{os.getpid()}{target.suffix}")
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise unwritable(output, error) from None


def behind_links(output: Path) -> Path:
    """The file that is meant, which need not exist. Raises UserError for a link that leads to itself."""
    try:
        return output.resolve(strict=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{output}: cannot be written: the link leads to itself ({error})") from None


def unwritable(output: Path, error: OSError) -> UserError:
    """The mistake of an output that cannot be written."""
    return UserError(f"{output}: cannot be written: {error.strerror or error}")
