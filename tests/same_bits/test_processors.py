"""The exact mode on the CPU has the same bits on other processors, and a row the same scores in any company.

Switches that make the libraries compute as on another processor stand in for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from dist_train.commands.sample import TABLE
from tests.cli.in_process import command
from tests.commands import run
from tests.resume.jobs import finish, tiny_job, write_table

MORE = ("train.virtual_ranks=2", "train.max_steps=12", "train.class_weights=balanced", "model.hidden_dim=64")
SWITCHES = [
    {"MKL_CBWR": "COMPATIBLE"},  # MKL without fused multiply-adds: its products are not used
    pytest.param({"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, marks=pytest.mark.slow),
    pytest.param({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}, marks=pytest.mark.slow),
    pytest.param({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, marks=pytest.mark.slow),
    pytest.param({"ATEN_CPU_CAPABILITY": "avx2"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: ",".join(s))
def test_a_run_is_the_same_bits(switches: dict[str, str], tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    here = finish(tiny_job(table, tmp_path / "here", *MORE), 1)
    there = tiny_job(table, tmp_path / "there", *MORE)
    ended = run("train", *there, **switches)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "there" / "summary.json").read_text())
    assert summary["weights_sha256"] == here["weights_sha256"]
    assert summary["test"] == here["test"]


def test_a_row_has_the_same_scores_alone_and_among_others(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    run_dir = tmp_path / "run"
    finish(tiny_job(table, run_dir, *MORE), 1)
    lines = table.read_text().splitlines()
    (tmp_path / "alone.csv").write_text("\n".join([lines[0], lines[77]]) + "\n")
    scored = []
    for name, source in (("all", table), ("one", tmp_path / "alone.csv")):
        done = command("predict", run_dir, source, tmp_path / f"{name}.csv")
        assert done.code == 0, done.err
        scored.append((tmp_path / f"{name}.csv").read_text().splitlines())
    assert scored[1][1] == scored[0][77]


AS_AVX2 = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "haswell"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("train.virtual_ranks=4",)], ids=["fast", "exact"])
@pytest.mark.parametrize("family", ["financial_classifier", "tabm", "resnet", "realmlp"])
def test_ten_thousand_rows_have_the_same_scores_in_any_company(
    family: str, mode: tuple[str, ...], tmp_path: Path
) -> None:
    table = tmp_path / "clients.parquet"
    pl.read_parquet(TABLE)[:10_000].write_parquet(table)
    run_dir = tmp_path / "run"
    arguments = ["data.path=builtin:credit_card_risk", "data.target=risk_tier", "data.split_column=split"]
    arguments += [
        "train.max_steps=40",
        "wandb.mode=disabled",
        f"run.dir={tmp_path}",
        "run.name=run",
        "runtime.device=cpu",
    ]
    done = command("train", *arguments, f"model.name={family}", *mode)
    assert done.code == 0, done.err
    for switches in ({}, AS_AVX2):
        ended = subprocess.run(
            [sys.executable, "-m", "tests.same_bits.scores", run_dir, table],
            env=os.environ | switches, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)
        assert len(found) > 8
        assert not any(found.values()), found
