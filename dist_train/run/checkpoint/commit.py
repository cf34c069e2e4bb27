"""A folder of files that is either whole and verified, or not there.

Written aside, synced to disk, read back and compared, then made real by one rename. Its MANIFEST.json is written last
and holds the size and SHA-256 of every part, and a SHA-256 of that list.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dist_train.system.files import TMP_PREFIX, sync_folder, with_path, write_synced

MANIFEST = "MANIFEST.json"
_FORMER = f"{TMP_PREFIX}former-"
_REMOVED = f"{TMP_PREFIX}removed-"
_ANOTHER = "~"


class CorruptCheckpoint(Exception):
    """A committed folder is not what was written; the message names the part and what is wrong with it."""


def commit(folder: Path, parts: Mapping[str, bytes], confirm: Callable[[], None] = lambda: None) -> None:
    """Write `parts` (file name -> content): `folder` then holds all of them, or does not change.

    A name may have a `/` in it: the file is in a folder below. Each content is asked for once and let go before the
    next one.

    `confirm` raises where this process may not write there any more. It is called just before the rename, and after a
    failure: its error may name the cause.

    Raises:
        OSError: the parts could not be written, or do not read back.
    """
    aside = _cleared(folder.with_name(TMP_PREFIX + folder.name))
    with with_path(folder):
        try:
            aside.mkdir()
            manifest = {name: _write_part(aside / name, parts[name]) for name in parts}
            for inner in {(aside / name).parent for name in parts} - {aside}:
                sync_folder(inner)
            content = {"parts": manifest, "sha256": _digest(manifest)}
            write_synced(aside / MANIFEST, json.dumps(content, indent=1).encode())
            sync_folder(aside)
            try:
                check_folder(aside)
            except CorruptCheckpoint as damage:
                raise OSError(f"{folder}: what was written does not read back: {damage}") from None
            confirm()
            _replace_folder(aside, folder)
            sync_folder(folder.parent)
        except BaseException as failure:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(failure, OSError):
                confirm()
            raise


def _write_part(file: Path, data: bytes) -> dict[str, Any]:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_synced(file, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def list_parts(folder: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of every part, by file name, as the manifest of a committed folder says.

    Raises:
        CorruptCheckpoint: the manifest is missing, or has another content than was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        listed = manifest["parts"]
        if manifest["sha256"] != _digest(listed):
            raise CorruptCheckpoint(f"{folder / MANIFEST} has another content than was written (SHA-256 differs)")
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{folder / MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CorruptCheckpoint(f"{folder / MANIFEST} cannot be read") from None
    if not expected:
        raise CorruptCheckpoint(f"{folder / MANIFEST} names no parts")
    for name in expected:
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or str(place) != name:
            raise CorruptCheckpoint(f"{folder / MANIFEST} names {name!r}, which is not a file of this folder")
    return expected


def read_part(folder: Path, name: str, size: int, sha256: str) -> bytes:
    """The bytes of a part.

    Raises:
        CorruptCheckpoint: it is missing, or has another size or content than was written.
    """
    try:
        data = (folder / name).read_bytes()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise CorruptCheckpoint(f"{folder / name} is missing or cannot be read") from None
    if len(data) != size:
        raise CorruptCheckpoint(f"{folder / name} has {len(data)} bytes instead of {size}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptCheckpoint(f"{folder / name} has another content than was written (SHA-256 differs)")
    return data


def read_verified(folder: Path) -> dict[str, bytes]:
    """The bytes of every part of a committed folder.

    Raises:
        CorruptCheckpoint: a part is missing, or has another size or content than was written.
    """
    return {name: read_part(folder, name, *expected) for name, expected in list_parts(folder).items()}


def check_folder(folder: Path) -> None:
    """Read every part of a committed folder, one at a time.

    Raises:
        CorruptCheckpoint: a part is missing, or has another size or content than was written.
    """
    for name, expected in list_parts(folder).items():
        read_part(folder, name, *expected)


def is_whole(folder: Path) -> bool:
    """Whether a folder was committed and still holds what was written."""
    try:
        check_folder(folder)
    except CorruptCheckpoint:
        return False
    return True


def remove(folder: Path) -> None:
    """Remove a committed folder. It is renamed first: a kill in between leaves no half of it under its name."""
    aside = _cleared(folder.with_name(_REMOVED + folder.name))
    folder.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _digest(manifest: Mapping[str, Any]) -> str:
    # A flipped bit can turn the name of one part into that of another, and JSON keeps only the last of two equal names.
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def remove_stale(parent: Path) -> None:
    """Remove what a killed process left half-written, and restore a folder that it was about to replace."""
    if not parent.is_dir():
        return
    # An NFS client lists a folder from its cache for up to a minute, without what another host has just renamed there.
    # A change of its own makes it read the folder again.
    (parent / f"{TMP_PREFIX}probe").touch()
    for former in parent.glob(f"{_FORMER}*"):
        folder = parent / former.name.removeprefix(_FORMER).partition(_ANOTHER)[0]
        if not folder.exists() and is_whole(former):
            former.replace(folder)
    for aside in parent.glob(f"{TMP_PREFIX}*"):
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def _replace_folder(aside: Path, folder: Path) -> None:
    # A folder cannot be renamed over one with files in it. The old one is renamed first, so that it can be restored
    # (here, or by `remove_stale` after a kill), and removed once the new one is in place.
    if not folder.exists():
        aside.replace(folder)
        return
    former = _cleared(folder.with_name(_FORMER + folder.name))
    folder.replace(former)
    try:
        aside.replace(folder)
    except OSError:
        former.replace(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _cleared(aside: Path) -> Path:
    """A free name: `aside`, or a numbered one where NFS keeps a file that another process has open."""
    number, free = 0, aside
    while True:
        shutil.rmtree(free, ignore_errors=True)
        if not free.exists():
            return free
        number += 1
        free = aside.with_name(f"{aside.name}{_ANOTHER}{number}")
