"""`--help` shows the commands a person would type, and they are right."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from dist_train.__main__ import VERBS
from dist_train.commands.parser import as_called
from tests import commands
from tests.cli.in_process import command, contents


def commands_in(text: str, script: str) -> list[list[str]]:
    """Command lines of a text that call `launch/<script>.py`, as words."""
    lines = [line.partition("   #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if re.match(rf"(python|torchrun) .*launch/{script}\.py", line)]


def examples(script: str) -> list[list[str]]:
    """Command lines of a help text, as words."""
    return commands_in(command(script, "--help").out, script)


@pytest.mark.parametrize("script", VERBS)
def test_help_shows_commands_to_type(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(script, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    assert f"usage: launch/{script}.py" in outcome.out
    assert len(examples(script)) >= (1 if script == "sample" else 2)
    assert not contents(tmp_path)


@pytest.mark.parametrize("script", VERBS)
def test_the_entry_file_of_a_checkout_shows_commands_and_the_options_exist(script: str) -> None:
    known = set(re.findall(r"--[a-z-]+", command(script, "--help").out.partition("\n\n")[0]))
    shown = commands_in(importlib.import_module(f"launch.{script}").__doc__ or "", script)
    assert shown
    for words in [*shown, *examples(script)]:
        after = words[words.index(f"launch/{script}.py") :]
        assert {word.partition("=")[0] for word in after if word.startswith("--")} <= known


def test_the_training_examples_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(commands.REPOSITORY)
    for words in examples("train"):
        arguments = words[words.index("launch/train.py") + 1 :]
        if "--dry-run" not in arguments:
            arguments.append("--dry-run")
        outcome = command("train", *arguments, f"run.dir={tmp_path}", "runtime.device=cpu")
        assert outcome.code == 0, outcome.err
        assert "steps " in outcome.err
        assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("program", "alone", "on_ranks"),
    [
        ("dist-train train", "dist-train train a.yaml", "torchrun -m dist_train train a.yaml"),
        ("python -m dist_train train", "python -m dist_train train a.yaml", "torchrun -m dist_train train a.yaml"),
        ("launch/train.py", "python launch/train.py a.yaml", "torchrun launch/train.py a.yaml"),
    ],
)
def test_examples_are_written_as_the_program_was_called(program: str, alone: str, on_ranks: str) -> None:
    text = "    dist-train train a.yaml\n    torchrun -m dist_train train a.yaml"
    assert as_called(program, text) == f"    {alone}\n    {on_ranks}"
