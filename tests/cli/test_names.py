"""Names in files and in folders: shown as they are, as text and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from tests.cli.in_process import CommandResult, command
from tests.cli.tables import clients, run_arguments


def trained_in(folder: Path, frame: pl.DataFrame, *more: str) -> CommandResult:
    frame.write_parquet(folder.parent / "clients.parquet")
    return command("train", *run_arguments(folder, folder.parent / "clients.parquet"), "train.max_steps=2", *more)


def is_safe(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("name", ["optim.lr=0.1", "a=b.yaml", "[red]", "1e3", "~"])
def test_every_command_reads_a_run_of_any_name(name: str, tmp_path: Path) -> None:
    run = tmp_path / name
    outcome = trained_in(run, clients())
    assert outcome.code == 0, outcome.err
    assert run.is_dir()
    data = tmp_path / "clients.parquet"
    for verb, *arguments in (("evaluate", run), ("verify", run), ("predict", run, data, tmp_path / "o.csv")):
        outcome = command(verb, *arguments)
        assert outcome.code == 0, outcome.err
    again = command("train", run / "config.yaml", f"run.dir={tmp_path}", "run.name='again'")
    assert again.code == 0, again.err


def test_class_names_are_no_markup_and_reach_no_terminal_raw(tmp_path: Path) -> None:
    names = {"low": "[low]", "mid": "[/mid] :smile:", "high": "a\x1b[31m\x9b1m\u202e\n\\z"}
    frame = clients().with_columns(tier=pl.col("tier").replace(names))
    outcome = trained_in(tmp_path / "r", frame)
    assert outcome.code == 0, outcome.err
    assert is_safe(outcome.err)
    outcome = command("evaluate", tmp_path / "r")
    assert outcome.code == 0, outcome.err
    assert "[low]" in outcome.err
    assert "[/mid] :smile:" in outcome.err
    assert is_safe(outcome.err)
    assert is_safe(outcome.out)
    assert set(json.loads(outcome.out)["test"]["per_class"]) == set(names.values())
    assert is_safe(command("verify", tmp_path / "r").err)


ODD = ["annual\nincome", "\x1b[31mred", "\x9b31m", "a\rb", "\u202egnp", "tab\t", "del\x7f", "[bold]x", "\u2028"]


@pytest.mark.parametrize("name", ODD)
def test_a_column_name_in_a_message_is_one_printable_line(name: str, tmp_path: Path) -> None:
    frame = clients().rename({"income": name, "purpose": f"{name} 2"})
    for setting in ("data.drop=[q]", f"data.categorical=['{name}']" if name.isprintable() else "data.target=q"):
        outcome = trained_in(tmp_path / "r", frame, setting)
        assert (outcome.err.count("\n"), is_safe(outcome.err)) == (1, True) or outcome.code == 0, outcome.err
    odd = frame.with_columns(pl.lit([1]).alias(name))
    outcome = trained_in(tmp_path / "r", odd)
    assert (outcome.code, outcome.err.count("\n"), is_safe(outcome.err)) == (2, 1, True), outcome.err


TYPED = ["a\nb=c", "--x\x1b[31m", "data.path=\x1b[31m.csv", "optim.\nlr=1", "run.name=a\nb", "x\x9b.yaml"]


@pytest.mark.parametrize("word", TYPED)
def test_what_was_typed_reaches_no_terminal_raw(word: str, tmp_path: Path) -> None:
    outcome = command("train", f"run.dir={tmp_path}", word)
    assert outcome.code == 2
    assert is_safe(outcome.err)
    assert "Traceback" not in outcome.err


def test_a_tilde_is_the_home_folder_in_every_argument(tmp_path: Path) -> None:
    clients().write_csv(tmp_path / "t.csv")
    home = {"HOME": str(tmp_path)}
    arguments = [a for a in run_arguments(tmp_path / "runs" / "r", "~/t.csv") if not str(a).startswith("run.dir=")]
    outcome = command("train", *arguments, "run.dir=~/runs", "train.max_steps=2", **home)
    assert outcome.code == 0, outcome.err
    for verb, *words in (("evaluate", "~/runs/r", "--data", "~/t.csv"), ("predict", "~/runs/r", "~/t.csv", "~/o.csv"),
                         ("prepare", "~/t.csv", "~/store", "data.target=tier")):  # fmt: skip
        outcome = command(verb, *words, **home)
        assert outcome.code == 0, outcome.err
    assert {"runs", "t.csv", "o.csv", "store"} <= {path.name for path in tmp_path.iterdir()}


def test_the_report_of_torchrun_ends_with_the_mistake(tmp_path: Path) -> None:
    outcome = command("train", "optim.lr=nan", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert outcome.code == 2
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == outcome.err.strip()
