"""Where `predict` writes: never onto what it reads, through links, and refused before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tests.cli.conftest import Trained
from tests.cli.in_process import command, command_on_ranks, contents
from tests.cli.tables import clients


def refused(trained: Trained, source: Path, output: Path, *culprits: str) -> None:
    before = contents(output.parent), contents(trained.csv.parent)
    outcome = command("predict", trained.folder, source, output)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    assert all(part in outcome.err for part in (str(output), *culprits)), outcome.err
    assert (contents(output.parent), contents(trained.csv.parent)) == before


def itself(source: Path) -> Path:
    return source


def link(source: Path) -> Path:
    (source.parent / "link.csv").symlink_to(source.name)
    return source.parent / "link.csv"


def link_to_a_link(source: Path) -> Path:
    (source.parent / "second.csv").symlink_to(link(source))
    return source.parent / "second.csv"


def hard_link(source: Path) -> Path:
    (source.parent / "hard.csv").hardlink_to(source)
    return source.parent / "hard.csv"


def by_way_of_a_folder(source: Path) -> Path:
    (source.parent / "folder").symlink_to(source.parent)
    return source.parent / "folder" / ".." / source.parent.name / source.name


@pytest.mark.parametrize("other_name", [itself, link, link_to_a_link, hard_link, by_way_of_a_folder])
def test_the_input_is_not_overwritten(other_name: Callable[[Path], Path], trained: Trained, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    clients().write_csv(source)
    refused(trained, source, other_name(source), "is the input")


def test_an_input_that_is_a_link_is_not_overwritten(trained: Trained, tmp_path: Path) -> None:
    clients().write_csv(tmp_path / "in.csv")
    refused(trained, link(tmp_path / "in.csv"), tmp_path / "in.csv", "is the input")


def test_the_data_of_the_run_are_not_overwritten(trained: Trained, tmp_path: Path) -> None:
    clients().write_csv(tmp_path / "in.csv")
    refused(trained, tmp_path / "in.csv", trained.csv, "is the data of the run")
    (tmp_path / "link.csv").symlink_to(trained.csv)
    refused(trained, tmp_path / "in.csv", tmp_path / "link.csv", "is the data of the run")


def test_two_ranks_refuse_it_as_one_does(trained: Trained, tmp_path: Path) -> None:
    clients().write_csv(tmp_path / "in.csv")
    outcomes = command_on_ranks(2, "predict", trained.folder, tmp_path / "in.csv", tmp_path / "in.csv")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert (tmp_path / "in.csv").read_text() == clients().write_csv()


def test_the_file_behind_a_link_is_written(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, dangling = tmp_path / "elsewhere" / "real.csv", tmp_path / "dangling.csv"
    real.write_text("old\n")
    real.chmod(0o640)
    (tmp_path / "latest.csv").symlink_to(real)
    dangling.symlink_to("elsewhere/new.csv")
    for output, behind in ((tmp_path / "latest.csv", real), (dangling, tmp_path / "elsewhere" / "new.csv")):
        outcome = command("predict", trained.folder, trained.csv, output)
        assert outcome.code == 0, outcome.err
        assert output.is_symlink()
        assert not behind.is_symlink()
        assert pl.read_csv(behind).height == clients().height
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["new.csv", "real.csv"]


def test_an_output_that_cannot_be_written_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "null.parquet").symlink_to("/dev/null")
    (tmp_path / "round.csv").symlink_to("round.csv")
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    refusals = {
        "null.parquet": "not a regular file", "pipe.csv": "not a regular file",
        "round.csv": "", "folder.csv": "Is a directory", "no/such/folder.csv": "No such file",
    }  # fmt: skip
    for name, reason in refusals.items():
        outcome = command("predict", trained.folder, trained.csv, tmp_path / name)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), (name, outcome.err)
        assert name in outcome.err
        assert reason in outcome.err
    for path in (Path("/dev/stdout"), tmp_path / "o.xlsx", tmp_path / "o", tmp_path / "o.csv.gz"):
        assert ".csv or .parquet" in command("predict", trained.folder, trained.csv, path).err
    (tmp_path / "kept.csv").write_text("kept\n")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for everybody but root
    assert "Permission denied" in command("predict", trained.folder, trained.csv, tmp_path / "kept.csv").err
    assert (tmp_path / "kept.csv").read_text() == "kept\n"
