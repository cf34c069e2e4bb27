"""The README's commands, run in the printed order in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.cli.in_process import command
from tests.commands import REPOSITORY, environment
from tests.patience import PATIENCE_SECONDS

README = (REPOSITORY / "README.md").read_text()
# These blocks are marked `shell` and not run: they install, or need a cluster.
NOT_RUN = ("pip", "python -m venv", "sbatch")


def blocks(language: str) -> list[str]:
    """The contents of the README's code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def test_every_block_is_either_run_or_cannot_be() -> None:
    assert set(re.findall(r"^```(\w+)$", README, flags=re.M)) <= {"sh", "shell", "yaml", "python"}
    for block in blocks("shell"):
        assert all(line.startswith(NOT_RUN) for line in block.splitlines())


def carry_out(words: list[str]) -> None:
    """A command of the README: in this process, and on several ranks as it is printed, by torchrun."""
    match words:
        case ["cd", folder]:
            os.chdir(folder)
        case ["dist-train", verb, *arguments]:
            outcome = command(verb, *arguments, WANDB_MODE="disabled")
            assert outcome.code == 0, outcome.err
        case ["torchrun", *arguments]:
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", *arguments],
                env=environment(WANDB_MODE="disabled"),
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        case _:
            raise AssertionError(f"no test carries this out: {words}")


def test_the_commands_work_in_the_printed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "anywhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    script = "".join(blocks("sh")).replace("--nproc_per_node=8", "--nproc_per_node=2")
    for line in script.splitlines():
        carry_out(shlex.split(line))
    demo = folder / "demo"
    scores, clients = pl.read_csv(demo / "scores.csv"), pl.read_csv(demo / "clients.csv")
    assert scores.height == clients.height
    assert scores.select(pl.sum_horizontal("^probability_.*$")).to_series().to_list() == pytest.approx(
        [1.0] * clients.height, abs=1e-5
    )
    assert {folder.name for folder in (demo / "runs").iterdir()} == {"loans", "loans_exact", "loans_store"}
    weights = [
        json.loads((demo / "runs" / name / "summary.json").read_text())["weights_sha256"]
        for name in ("loans", "loans_store")
    ]
    assert weights[0] == weights[1], "training on a store gives the bits of training on its file"
