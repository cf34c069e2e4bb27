"""`--help` shows the commands a person would type, and they are right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests import commands
from tests.cli.in_process import command, contents

SCRIPTS = ["train", "evaluate", "predict", "submit"]


def examples(script: str) -> list[list[str]]:
    """Command lines of a help text that call `script`, as words."""
    text = command(script, "--help").out
    lines = [line.partition("   #")[0].strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if re.match(rf"(python|torchrun) .*launch/{script}\.py", line)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_commands_to_type(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(script, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    assert f"usage: launch/{script}.py" in outcome.out
    assert len(examples(script)) >= 2
    assert not contents(tmp_path)


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


@pytest.mark.parametrize("script", ["evaluate", "predict"])
def test_the_options_of_the_examples_exist(script: str) -> None:
    known = set(re.findall(r"--[a-z-]+", command(script, "--help").out.partition("\n\n")[0]))
    for words in examples(script):
        after = words[words.index(f"launch/{script}.py") :]
        assert {word for word in after if word.startswith("--")} <= known
