"""A committed folder is whole and verified, or it is not there; what was there before is intact."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.errors import TrainingFault
from dist_train.run.checkpoint import commit as module
from dist_train.run.checkpoint.commit import MANIFEST, CorruptCheckpoint, commit, read_verified, remove, remove_stale
from dist_train.system.files import write_atomically
from tests.patience import PATIENCE_SECONDS
from tests.ranks import _server
from tests.resume.jobs import Operations, Trap

OLD = {"a.json": b"old", "b.bin": b"former bytes"}
NEW = {"a.json": b"new", "b.bin": b"other bytes", "c.bin": b""}


def test_what_is_committed_reads_back(tmp_path: Path) -> None:
    commit(tmp_path / "one", NEW)
    assert read_verified(tmp_path / "one") == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    manifest = json.loads((tmp_path / "one" / MANIFEST).read_bytes())["parts"]
    assert manifest["a.json"]["bytes"] == 3
    assert len(manifest["a.json"]["sha256"]) == 64


def test_the_manifest_is_written_last(tmp_path: Path) -> None:
    commit(tmp_path / "one", NEW)
    commit(tmp_path / "one", OLD)
    assert read_verified(tmp_path / "one") == OLD
    written = sorted((p.stat().st_mtime_ns, p.name) for p in (tmp_path / "one").iterdir())
    assert written[-1][1] == MANIFEST
    assert {name for _, name in written} == {*OLD, MANIFEST}


@pytest.mark.parametrize("there_before", [False, True])
def test_an_operation_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    """A disk that fails at the n-th write, sync or rename, for every n."""
    folder = tmp_path / "one"
    number, failed = 0, True
    while failed:
        number += 1
        if there_before:
            commit(folder, OLD)
        with monkeypatch.context() as patch:
            _fail_at(patch, number)
            try:
                commit(folder, NEW)
                failed = False
            except OSError:
                failed = True
        if failed and folder.exists() and read_verified(folder) == NEW:
            # Only what comes after the rename may fail with the new one in its place.
            assert number >= 6
        elif failed:
            assert folder.exists() == there_before
            assert not there_before or read_verified(folder) == OLD
        remove_stale(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == (["one"] if folder.exists() else [])
    assert number > 6
    assert read_verified(folder) == NEW


def _fail_at(patch: pytest.MonkeyPatch, number: int) -> None:
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(28, "the disk is full")
            return function(*arguments, **named)

        return call

    patch.setattr(os, "fsync", counted(os.fsync))
    patch.setattr(Path, "open", counted(Path.open))
    patch.setattr(Path, "replace", counted(Path.replace))


def test_a_disk_that_writes_something_else_is_found_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tmp_path / "one", OLD)
    write = module.write_synced
    monkeypatch.setattr(
        module, "write_synced", lambda path, data: write(path, data[:-1] if "b.bin" in path.name else data)
    )
    with pytest.raises(OSError, match=r"does not read back.*b\.bin has 10 bytes instead of 11"):
        commit(tmp_path / "one", NEW)
    assert read_verified(tmp_path / "one") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, there_before: bool) -> None:
    folder, seen = tmp_path / "one", set()
    for number in range(1, 40):
        remove_stale(tmp_path)
        if there_before:
            commit(folder, OLD)
        elif folder.exists():
            remove(folder)
        process = _server().Process(target=_commit_and_die, args=(folder, number))
        process.start()
        process.join(PATIENCE_SECONDS)
        assert process.exitcode in (0, -signal.SIGKILL)
        if not folder.exists():
            remove_stale(tmp_path)  # what a resumed run does first
        content = read_verified(folder) if folder.exists() else None
        assert content in ([OLD, NEW] if there_before else [None, NEW])
        assert content == NEW or not seen & {"new"}, "the rename is made once"
        seen.add("new" if content == NEW else "old")
        if process.exitcode == 0:
            break
    assert seen == {"old", "new"}
    assert process.exitcode == 0


def _commit_and_die(folder: Path, number: int) -> None:
    with Operations().watching(Trap(nth=number, tear=True)):
        commit(folder, NEW)


def test_a_removed_folder_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path / "one", OLD)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before it began
    remove(tmp_path / "one")
    assert not (tmp_path / "one").exists()
    monkeypatch.undo()
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_may_not_write_any_more_changes_nothing(tmp_path: Path) -> None:
    commit(tmp_path / "one", OLD)

    def taken_over() -> None:
        assert read_verified(tmp_path / ".partial-one") == NEW, "asked at the last moment"
        raise TrainingFault("another job has it")

    with pytest.raises(TrainingFault, match="another job"):
        commit(tmp_path / "one", NEW, taken_over)
    assert read_verified(tmp_path / "one") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_the_parent_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "gone" / "one")):
        commit(tmp_path / "gone" / "one", NEW)

    def gone() -> None:
        raise TrainingFault("the folder is gone")

    with pytest.raises(TrainingFault, match="is gone"):
        commit(tmp_path / "gone" / "one", NEW, gone)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def open_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does it: a file that somebody has open stays in its folder under a name of its own."""
    rmtree = shutil.rmtree

    def leaves_one(path: Path, *, ignore_errors: bool) -> None:
        there = path.is_dir() and any(path.iterdir())
        rmtree(path, ignore_errors=ignore_errors)
        if there:
            path.mkdir()
            (path / ".nfs0001").touch()

    monkeypatch.setattr(shutil, "rmtree", leaves_one)


@pytest.mark.usefixtures("open_elsewhere")
def test_files_that_nfs_keeps_are_in_nobodys_way(tmp_path: Path) -> None:
    one = tmp_path / "one"
    for name in (".partial-one", ".partial-former-one", ".partial-removed-one"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").touch()
    for parts in (OLD, NEW, OLD):
        commit(one, parts)
        assert read_verified(one) == parts
        remove_stale(tmp_path)
        assert read_verified(one) == parts
    remove(one)
    remove_stale(tmp_path)
    assert not one.exists()
    assert all(p.name.startswith(".partial-") for p in tmp_path.iterdir())


def test_a_former_folder_under_another_name_is_put_back(tmp_path: Path) -> None:
    commit(tmp_path / ".partial-former-one~1", OLD)
    remove_stale(tmp_path)
    assert read_verified(tmp_path / "one") == OLD


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.EIO, errno.ENOSPC])
def test_a_file_system_that_cannot_sync_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    if number in (errno.EIO, errno.ENOSPC):
        with pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path / 'one'}'"):
            commit(tmp_path / "one", NEW)
    else:
        commit(tmp_path / "one", NEW)
        write_atomically(tmp_path / "two", b"two")
        assert read_verified(tmp_path / "one") == NEW


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: os.truncate(f / "b.bin", 4), r"b\.bin has 4 bytes instead of 11"),
    "emptied": (lambda f: (f / "b.bin").write_bytes(b""), r"b\.bin has 0 bytes instead of 11"),
    "longer": (lambda f: (f / "b.bin").write_bytes(b"other bytes!"), r"b\.bin has 12 bytes instead of 11"),
    "a bit": (lambda f: _flip(f / "b.bin", 5), r"b\.bin has another content"),
    "zeros": (lambda f: (f / "b.bin").write_bytes(bytes(11)), r"b\.bin has another content"),
    "missing": (lambda f: (f / "b.bin").unlink(), r"b\.bin is missing or cannot be read"),
    "a folder": (lambda f: ((f / "c.bin").unlink(), (f / "c.bin").mkdir()), r"c\.bin is missing or cannot be read"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), rf"{MANIFEST} is missing"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), rf"{MANIFEST} is missing"),
    "torn manifest": (lambda f: os.truncate(f / MANIFEST, 60), rf"{MANIFEST} cannot be read"),
    "manifest folder": (lambda f: ((f / MANIFEST).unlink(), (f / MANIFEST).mkdir()), rf"{MANIFEST} cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    commit(tmp_path / "one", NEW)
    act, message = DAMAGES[damage]
    act(tmp_path / "one")
    with pytest.raises(CorruptCheckpoint, match=message):
        read_verified(tmp_path / "one")


def test_every_flipped_bit_of_a_manifest_is_harmless_or_found(tmp_path: Path) -> None:
    commit(tmp_path / "one", NEW)
    manifest = tmp_path / "one" / MANIFEST
    data, found = manifest.read_bytes(), 0
    for position in range(len(data)):
        for bit in range(8):
            manifest.write_bytes(data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :])
            try:
                assert read_verified(tmp_path / "one") == NEW
            except CorruptCheckpoint:
                found += 1
    assert found > 7 * len(data)


def _vouch(folder: Path, listed: Any) -> None:
    """Give a folder a manifest that names anything and yet agrees with itself."""
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"parts": listed, "sha256": digest}))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04garbage", b"null", b"[]", b"3", b'"parts"', b"{}", b'{"parts": {}}', b"[" * 100_000],
    ids=lambda content: repr(content[:12]),
)
def test_garbage_for_a_manifest_is_damage(tmp_path: Path, content: bytes) -> None:
    commit(tmp_path / "one", NEW)
    (tmp_path / "one" / MANIFEST).write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=rf"{MANIFEST} cannot be read"):
        read_verified(tmp_path / "one")


@pytest.mark.parametrize(
    "listed",
    [
        {}, [], None, 3, {"a.json": None}, {"a.json": {"bytes": "many", "sha256": ""}}, {"a.json": {"bytes": 3}},
        {"a.json": {"bytes": float("inf"), "sha256": ""}}, {"nul\0": {"bytes": 0, "sha256": ""}},
        {"": {"bytes": 0, "sha256": ""}}, {"..": {"bytes": 0, "sha256": ""}}, {".": {"bytes": 0, "sha256": ""}},
    ],
)  # fmt: skip
def test_a_manifest_of_nonsense_is_damage(tmp_path: Path, listed: Any) -> None:
    commit(tmp_path / "one", NEW)
    _vouch(tmp_path / "one", listed)
    with pytest.raises(CorruptCheckpoint):
        read_verified(tmp_path / "one")


def test_a_manifest_that_was_edited_is_damage(tmp_path: Path) -> None:
    commit(tmp_path / "one", NEW)
    manifest = json.loads((tmp_path / "one" / MANIFEST).read_text())
    del manifest["parts"]["b.bin"]
    (tmp_path / "one" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorruptCheckpoint, match=rf"{MANIFEST} has another content"):
        read_verified(tmp_path / "one")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "x/../../secret"])
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    commit(tmp_path / "one", NEW)
    _vouch(tmp_path / "one", {name: {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}})
    with pytest.raises(CorruptCheckpoint, match="not a file of this folder"):
        read_verified(tmp_path / "one")


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    commit(tmp_path / "one", NEW)
    (tmp_path / "one" / "extra.pth").write_bytes(b"whatever")
    assert read_verified(tmp_path / "one") == NEW


def test_sweep_clears_files_and_folders_left_aside_and_nothing_else(tmp_path: Path) -> None:
    commit(tmp_path / "one", NEW)
    (tmp_path / ".partial-config.yaml").write_text("half")
    (tmp_path / ".partial-two").mkdir()
    (tmp_path / ".partial-two" / "a.json").write_text("half")
    (tmp_path / ".hidden").write_text("somebody's")
    remove_stale(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "one"]


def test_a_single_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    write_atomically(file, b"old")
    for number in (1, 2, 3):
        with monkeypatch.context() as patch:
            _fail_at(patch, number)
            with pytest.raises(OSError, match="disk"):
                write_atomically(file, b"new")
        assert file.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
