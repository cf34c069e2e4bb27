"""`python -m dist_train.config.run_path`: a path for job scripts, or a mistake told as `launch/train.py` tells it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.config.run_path import main
from tests.commands import REPOSITORY, environment
from tests.patience import PATIENCE_SECONDS


def test_the_run_folder_is_printed_and_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "my run.yaml"
    file.write_text(f"run: {{name: a run, dir: {tmp_path}}}\n")
    assert main([str(file), "optim.lr=0.1"]) == 0
    assert main([str(file), "run.dir=elsewhere", "run.name='2024'"]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/a run\nelsewhere/2024\n", "")
    assert list(tmp_path.iterdir()) == [file]


def test_all_mistakes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim.lrr=1", "nowhere.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: 2 mistakes")
    assert "optim.lrr" in err
    assert "nowhere.yaml" in err


def test_it_starts_without_torch() -> None:
    program = "import sys, dist_train.config.run_path; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment(), check=False, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0
