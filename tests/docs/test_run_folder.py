"""Every file that a run folder can hold is listed in one place."""

from __future__ import annotations

import re
from pathlib import Path

from dist_train.api.classifier import TABLE
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.ensemble import OUT_OF_FOLD
from dist_train.system.files import TMP_PREFIX
from dist_train.tasks.text import TOKENS
from tests.commands import REPOSITORY


def test_the_files_of_a_run_folder_are_listed() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    table = page.partition("### The run folder\n\n")[2].partition("\n\n")[0]
    listed = {name.rstrip("/") for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    folder = RunFolder(Path("run"))
    paths = {path.name for path in vars(folder).values() if isinstance(path, Path)} - {folder.path.name}
    assert "witness.jsonl" in paths
    paths |= {"split.json", "split.parquet", "report.html", "report.json", "figures", "wandb", "mlflow.json"}
    paths |= {"tensorboard", "curves.png", TABLE, TOKENS, f"{TOKENS}.key", OUT_OF_FOLD, f"{TMP_PREFIX}..."}
    assert paths - listed == set()
