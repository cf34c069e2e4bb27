"""What torchrun tells its ranks. Apart from `world.py`, so that a command that needs no torch does not import it."""

from __future__ import annotations

from collections.abc import Mapping

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def missing_from_torchrun(environ: Mapping[str, str]) -> list[str]:
    """Variables of torchrun that are missing where others of them are set; empty when all or none are there."""
    missing = [name for name in TORCHRUN_VARIABLES if name not in environ]
    by_srun = "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ  # job scripts often export MASTER_ADDR
    return [] if by_srun or len(missing) == len(TORCHRUN_VARIABLES) else missing
