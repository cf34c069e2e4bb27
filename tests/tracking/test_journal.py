"""metrics.jsonl: every line whole, and none of a step that will be trained again."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dist_train.tracking.journal import Journal


def _lines(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def _journal(file: Path, *steps: int) -> Journal:
    journal = Journal(file)
    for step in steps:
        journal.log({"step": step, "split": "train", "class": "niño"})
    return journal


def test_lines_are_appended_and_whole_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    journal = _journal(file, 1, 2)
    assert _lines(file) == [1, 2], "a line is there before the file is closed"
    assert "niño" in file.read_text(encoding="utf-8")
    assert journal.state_dict() == {"bytes": file.stat().st_size}
    journal.close()
    journal.close()
    _journal(file, 3).close()
    assert _lines(file) == [1, 2, 3]


def test_what_was_written_after_the_state_is_cut_off_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    journal = _journal(file, 1, 2)
    state = journal.state_dict()
    whole = file.read_bytes()
    journal.log({"step": 3})
    journal.close()
    with file.open("ab") as stream:
        stream.write(b'{"step": 4, "lo')  # killed while it wrote

    resumed = Journal(file)
    assert resumed.last_step == 3
    resumed.load_state_dict(state)
    assert file.read_bytes() == whole
    resumed.log({"step": 3})
    resumed.close()
    assert _lines(file) == [1, 2, 3]


def test_a_run_without_a_checkpoint_starts_an_empty_file(tmp_path: Path) -> None:
    journal = _journal(tmp_path / "metrics.jsonl", 1, 2)
    journal.load_state_dict({"bytes": 0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    journal.close()


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
    journal = Journal(file)
    journal.load_state_dict(state)
    journal.log({"step": 4})
    journal.close()
    assert _lines(file) == [1] * left.count(b"\n") + [4]
    assert "lines are missing" in caplog.text


@pytest.mark.parametrize("line", [b"", b"\xff\xfe", b"null", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b'{"step": nu'])
def test_a_line_that_is_none_does_not_hide_the_last_step(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 7}\n' + line + b"\n" + b'{"step": 5}\n')
    journal = Journal(file)
    assert journal.last_step == 7
    journal.close()
