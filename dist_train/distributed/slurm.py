"""Which attempt of which scheduler's job this process belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_train.errors import UserError


@dataclass(frozen=True)
class Attempt:
    """A Slurm job keeps its id when it is requeued, and counts its restarts."""

    job: str
    restart: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Attempt | None:
        """The attempt that Slurm has started; None outside Slurm."""
        job = environ.get("SLURM_JOB_ID")  # of its own for each element of a job array
        if not job:
            return None
        restart = environ.get("SLURM_RESTART_COUNT") or "0"  # Slurm sets it from the first restart on
        if not restart.isdecimal():
            raise UserError(f"SLURM_RESTART_COUNT={restart!r} in the environment is not a whole number")
        return cls(job, int(restart))

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}"
