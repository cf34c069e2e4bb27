"""The examples run as they are, next to an installed package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, environment
from tests.patience import PATIENCE_SECONDS


@pytest.mark.parametrize("example", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda file: file.name)
def test_example(example: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(example, tmp_path))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(copy)],
        cwd=tmp_path,
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "own model:" in done.stdout
