"""Files that are on disk once they are written, and errors that name what could not be written."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TMP_PREFIX = ".partial-"
"""What a name begins with until its content is whole."""


@contextmanager
def with_path(path: Path) -> Iterator[None]:
    """Inside the block an OSError names `path`: of a failed write it names nothing, else often what lies aside."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256_of(file: Path) -> str:
    """Fingerprint of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a single file by one rename."""
    aside = path.with_name(TMP_PREFIX + path.name)
    with with_path(path):
        try:
            write_synced(aside, data)
            aside.replace(path)
        except BaseException:
            _discard(aside)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's own entries are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems (CIFS, some FUSE ones) cannot sync a folder; their renames are as durable as they get.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # why it could not be written is what counts, not why it cannot be removed
