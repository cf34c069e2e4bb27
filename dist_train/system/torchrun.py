"""What a launcher tells its ranks by environment variables. It needs no torch, as a command's first messages."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def missing_from_torchrun(environ: Mapping[str, str]) -> list[str]:
    """Variables of torchrun that are missing where others of them are set; empty when all or none are there."""
    missing = [name for name in TORCHRUN_VARIABLES if name not in environ]
    by_srun = "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ  # job scripts often export MASTER_ADDR
    return [] if by_srun or len(missing) == len(TORCHRUN_VARIABLES) else missing


def rank_for_messages(environ: Mapping[str, str]) -> int:
    """The rank of this process, before the environment has been checked; 0 where it says none."""
    return _number(environ.get("RANK") or environ.get("SLURM_PROCID"), 0)


def has_peers(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several ranks, before the environment has been checked."""
    size = environ.get("WORLD_SIZE") if "RANK" in environ else environ.get("SLURM_STEP_NUM_TASKS")
    return rank_for_messages(environ) > 0 or _number(size, 1) > 1


def show_in_report(message: str, environ: Mapping[str, str]) -> None:
    """Have torchrun end its report of a failed rank with `message`, and not with a hint at its documentation.

    torchrun names a file for that to each rank; its content is that of torch.distributed.elastic's ErrorHandler.
    """
    file = environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() else default
