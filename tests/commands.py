"""Run the commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_SECONDS

REPOSITORY = Path(__file__).parent.parent


def environment(**more: str) -> dict[str, str]:
    """The environment without anything that a launcher or wandb may have left in it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WANDB_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    return clean | {"OMP_NUM_THREADS": "1"} | more


def command_line(script: str, *arguments: object, ranks: int = 1) -> list[str]:
    """`python launch/<script>.py ...`, or the same under torchrun when `ranks` is above 1."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*start, str(REPOSITORY / "launch" / f"{script}.py"), *(str(a) for a in arguments)]


def run(script: str, *arguments: object, ranks: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command_line(script, *arguments, ranks=ranks),
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def train(run_dir: Path, *arguments: object, ranks: int = 1) -> dict[str, Any]:
    """Train into `run_dir` without wandb; the summary."""
    done = run(
        "train", f"run.dir={run_dir.parent}", f"run.name={run_dir.name}", "wandb.mode=disabled", *arguments, ranks=ranks
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary
