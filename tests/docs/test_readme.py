"""The README's commands, run in the printed order in an empty folder, as an installed package runs them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

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


@pytest.mark.timeout(3 * PATIENCE_SECONDS)
def test_the_commands_work_in_the_printed_order(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("dist-train", "dist_train"), ("torchrun", "torch.distributed.run")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
        program.chmod(0o755)
    script = "set -ex\n" + "".join(blocks("sh")).replace("--nproc_per_node=8", "--nproc_per_node=2")
    folder = tmp_path / "anywhere"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(WANDB_MODE="disabled", PATH=f"{programs}:/usr/bin:/bin"),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
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
