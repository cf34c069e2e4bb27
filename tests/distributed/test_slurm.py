"""A job, and how often it was restarted."""

from __future__ import annotations

import pytest

from dist_train.distributed.slurm import Attempt
from dist_train.errors import UserError


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": ""}, {"SLURM_RESTART_COUNT": "1"}])
def test_outside_slurm_there_is_none(environ: dict[str, str]) -> None:
    assert Attempt.from_environment(environ) is None


@pytest.mark.parametrize(("count", "restart"), [(None, 0), ("", 0), ("0", 0), ("2", 2)])
def test_a_job_counts_its_restarts(count: str | None, restart: int) -> None:
    environ = {"SLURM_JOB_ID": "123"} | ({} if count is None else {"SLURM_RESTART_COUNT": count})
    attempt = Attempt.from_environment(environ)
    assert attempt == Attempt("123", restart)
    assert str(attempt) == f"123.{restart}"


@pytest.mark.parametrize("count", ["-1", "x", "1.0"])
def test_a_count_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT='"):
        Attempt.from_environment({"SLURM_JOB_ID": "123", "SLURM_RESTART_COUNT": count})
