"""metrics.jsonl: every line whole, and none of a step that will be trained again."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from dist_train.run.tracking.jsonl_tracker import JsonlTracker


def _lines(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def _journal(file: Path, *steps: int) -> JsonlTracker:
    jsonl = JsonlTracker(file)
    for step in steps:
        jsonl.log({"step": step, "split": "train", "class": "niño"})
    return jsonl


def test_lines_are_appended_and_whole_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    jsonl = _journal(file, 1, 2)
    assert _lines(file) == [1, 2], "a line is there before the file is closed"
    assert "niño" in file.read_text(encoding="utf-8")
    assert jsonl.state_dict() == {"bytes": file.stat().st_size}
    jsonl.close()
    jsonl.close()
    _journal(file, 3).close()
    assert _lines(file) == [1, 2, 3]


def test_what_was_written_after_the_state_is_cut_off_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    jsonl = _journal(file, 1, 2)
    state = jsonl.state_dict()
    whole = file.read_bytes()
    jsonl.log({"step": 3})
    jsonl.close()
    with file.open("ab") as stream:
        stream.write(b'{"step": 4, "lo')  # killed while it wrote

    resumed = JsonlTracker(file)
    assert resumed.last_step == 3
    resumed.load_state_dict(state)
    assert file.read_bytes() == whole
    resumed.log({"step": 3})
    resumed.close()
    assert _lines(file) == [1, 2, 3]


def test_a_run_without_a_checkpoint_starts_an_empty_file(tmp_path: Path) -> None:
    jsonl = _journal(tmp_path / "metrics.jsonl", 1, 2)
    jsonl.load_state_dict({"bytes": 0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    jsonl.close()


@pytest.mark.parametrize("left", [b"", b'{"step": 1}\n', b'{"step": 1}\n{"ste'])
def test_lost_lines_are_reported_and_a_torn_one_does_not_spoil_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    file = tmp_path / "metrics.jsonl"
    written = _journal(file, 1, 2, 3)
    state = written.state_dict()
    written.close()
    file.write_bytes(left)
    jsonl = JsonlTracker(file)
    jsonl.load_state_dict(state)
    jsonl.log({"step": 4})
    jsonl.close()
    assert _lines(file) == [1] * left.count(b"\n") + [4]
    assert "lines are missing" in caplog.text


@pytest.mark.parametrize("line", [b"", b"\xff\xfe", b"null", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b'{"step": nu'])
def test_a_line_that_is_none_does_not_hide_the_last_step(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 7}\n' + line + b"\n" + b'{"step": 5}\n')
    jsonl = JsonlTracker(file)
    assert jsonl.last_step == 7
    jsonl.close()


class _Disk:
    """Stands for the calls that a disk can refuse; `free_bytes` is what it takes before it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_bytes: int | None = None
        self.syncs = True
        pwrite, fsync = os.pwrite, os.fsync

        def write(handle: int, data: bytes, offset: int) -> int:
            if self.free_bytes == 0:
                raise OSError(28, "No space left on device")
            written = pwrite(handle, data[: self.free_bytes], offset)
            if self.free_bytes is not None:
                self.free_bytes -= written
            return written

        def sync(handle: int) -> None:
            if not self.syncs:
                raise OSError(5, "Input/output error")
            fsync(handle)

        monkeypatch.setattr(os, "pwrite", write)
        monkeypatch.setattr(os, "fsync", sync)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("free_bytes", [0, 1, 7, 20])
def test_a_full_disk_costs_lines_and_leaves_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free_bytes: int
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    file, disk = tmp_path / "metrics.jsonl", _Disk(monkeypatch)
    jsonl = _journal(file, 1, 2)
    disk.free_bytes = free_bytes
    for step in (3, 4):
        jsonl.log({"step": step, "split": "train"})
    disk.free_bytes = None
    assert jsonl.state_dict()["bytes"] == file.stat().st_size
    assert _lines(file) == [1, 2]
    jsonl.log({"step": 5})
    disk.free_bytes = free_bytes
    jsonl.log({"step": 6, "split": "train"})
    disk.free_bytes = None
    jsonl.log({"step": 7})
    jsonl.close()
    assert _lines(file) == [1, 2, 5, 7]
    assert _warnings(caplog) == [f"{file} cannot be written (No space left on device): lines of metrics are lost"]


def test_a_failed_sync_has_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, disk = tmp_path / "metrics.jsonl", _Disk(monkeypatch)
    jsonl = _journal(file, 1)
    disk.syncs = False
    with pytest.raises(OSError, match=f"Input/output error: '{file}'"):
        jsonl.state_dict()
    with pytest.raises(OSError, match=f"Input/output error: '{file}'"):
        jsonl.close()
    jsonl.close()


@pytest.mark.parametrize("change", ["removed", "replaced", "cut"])
def test_a_file_that_is_not_the_one_that_was_written_has_no_state(tmp_path: Path, change: str) -> None:
    file = tmp_path / "metrics.jsonl"
    jsonl = _journal(file, 1, 2)
    jsonl.state_dict()
    if change == "cut":
        os.truncate(file, 5)
    else:
        file.rename(tmp_path / "moved")
    if change == "replaced":
        shutil.copy(tmp_path / "moved", file)
    left = file.read_bytes() if file.exists() else None
    jsonl.log({"step": 3})
    with pytest.raises(OSError, match=str(file)):
        jsonl.state_dict()
    with pytest.raises(OSError, match=str(file)):
        jsonl.close()
    assert (file.read_bytes() if file.exists() else None) == left, "nothing appears in somebody else's file"


def test_a_former_attempt_cannot_write_into_the_file_of_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    former = _journal(file, 1)
    state = former.state_dict()
    former.log({"step": 2})
    following = JsonlTracker(file)
    following.load_state_dict(state)
    following.log({"step": 2})
    former.log({"step": 3})
    with pytest.raises(OSError, match="replaced by another one"):
        former.state_dict()
    following.log({"step": 3})
    following.close()
    assert _lines(file) == [1, 2, 3]
