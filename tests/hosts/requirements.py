"""What tests on hosts and on Slurm need from a machine: the one place that says skip or fail."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

# Daemons and ip are in sbin, which is not on every user's path.
SEARCH_PATH = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin"

FOR_HOSTS = ("ip", "nsenter", "unshare", "mount")
FOR_SLURM = (*FOR_HOSTS, "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing(programs: tuple[str, ...]) -> list[str]:
    """What this machine lacks."""
    if sys.platform != "linux":
        return ["Linux"]
    return [name for name in programs if shutil.which(name, path=SEARCH_PATH) is None] + ["root"] * (os.geteuid() != 0)


def require(programs: tuple[str, ...]) -> None:
    """Skip the test, and say why, where something is missing; in CI nothing may be missing, so fail there."""
    if lacking := missing(programs):
        reason = f"needs {', '.join(lacking)}"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; in CI a skipped test would prove nothing", pytrace=False)
        pytest.skip(reason)
