"""The exact mode on the CPU has the same bits on other processors, and a row the same scores in any company.

Switches that make the libraries compute as on another processor stand in for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dist_train import load
from dist_train.commands.sample import TABLE
from tests.cli.in_process import command
from tests.commands import environment, run
from tests.resume.jobs import finish, outcome, tiny_job, write_table
from tests.same_bits.matrix import PROCESSORS

MORE = ("train.virtual_ranks=2", "train.max_steps=12", "train.class_weights=balanced", "model.hidden_dim=64")
TABM = ("model.name=tabm", "model.tabm.members=4", "model.tabm.width=16", "data.numeric_transform=quantile")
# All libraries without fused multiply-adds; the others are in the slow tests.
EVERYDAY = "SSE4.2"


@pytest.mark.parametrize(
    ("processor", "family"),
    [
        (EVERYDAY, ()),
        pytest.param(EVERYDAY, TABM, marks=pytest.mark.slow),
        *(
            pytest.param(name, (), marks=pytest.mark.slow)
            for name, switches in PROCESSORS.items()
            if switches and name != EVERYDAY
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0] if value else "",
)
def test_a_run_and_its_scores_are_the_same_bits(processor: str, family: tuple[str, ...], tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    here = finish(tiny_job(table, tmp_path / "here", *MORE, *family), 1)
    assert command("predict", tmp_path / "here", table, tmp_path / "here.csv").code == 0
    there, switches = tiny_job(table, tmp_path / "there", *MORE, *family), PROCESSORS[processor]
    for arguments in (("train", *there), ("predict", tmp_path / "there", table, tmp_path / "there.csv")):
        ended = run(*arguments, **switches)
        assert ended.returncode == 0, ended.stderr
    assert outcome(tmp_path / "there") == here
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()


def test_a_row_has_the_same_scores_alone_and_among_others(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    run_dir = tmp_path / "run"
    finish(tiny_job(table, run_dir, *MORE), 1)
    lines = table.read_text().splitlines()
    for name, rows in (("alone", lines[77:78]), ("reversed", lines[:0:-1])):
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    scored = {}
    for source in (table, tmp_path / "alone.csv", tmp_path / "reversed.csv"):
        output = tmp_path / f"scores_of_{source.name}"
        done = command("predict", run_dir, source, output)
        assert done.code == 0, done.err
        scored[source.stem] = output.read_text().splitlines()
    assert scored["alone"][1] == scored["clients"][77]
    assert scored["reversed"][:0:-1] == scored["clients"][1:]
    model, frame = load(run_dir), pl.read_csv(table)
    whole = model.predict_proba(frame)
    for size in (1, 2, 5, 17, 33):
        batches = np.concatenate([model.predict_proba(rows) for rows in frame[:99].iter_slices(size)])
        assert batches.tobytes() == whole[:99].tobytes()
    assert pl.read_csv(tmp_path / "scores_of_clients.csv").drop("predicted_class").to_numpy().tolist() == whole.tolist()


EXACT = "train.virtual_ranks=4"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("family", "mode", "calls"),
    [
        ("financial_classifier", EXACT, 10_000),
        ("tabm", EXACT, 10_000),
        ("financial_classifier", None, 300),
        ("tabm", None, 300),
        ("resnet", EXACT, 300),
        ("realmlp", EXACT, 300),
    ],
)
def test_ten_thousand_rows_have_the_same_scores_in_any_company(
    family: str, mode: str | None, calls: int, tmp_path: Path
) -> None:
    table = tmp_path / "clients.parquet"
    pl.read_parquet(TABLE).drop("split")[:10_000].write_parquet(table)
    arguments = ["data.path=builtin:credit_card_risk", "data.target=risk_tier", "data.split_column=split"]
    arguments += ["train.max_steps=40", "wandb.mode=disabled", f"run.dir={tmp_path}", "runtime.device=cpu"]
    arguments += [f"model.name={family}", *([mode] if mode else [])]
    for name, rows in (("run", 2048), ("wide", 65_536)):
        done = command("train", *arguments, f"run.name={name}", f"evaluation.batch_size={rows}")
        assert done.code == 0, done.err
    hashes = []
    for processor in ("native", "all AVX2"):
        ended = subprocess.run(
            [sys.executable, "-m", "tests.same_bits.scores",
             tmp_path / "run", tmp_path / "wide", table, tmp_path, f"--calls={calls}"],
            env=environment(**PROCESSORS[processor]), capture_output=True, text=True, timeout=3000, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)
        print(family, mode, processor, found["differing"], found["sha256"])
        assert len(found["differing"]) == 19
        assert not any(differ for _, differ in found["differing"].values()), found["differing"]
        assert found["metrics"]["1"] == found["metrics"]["3"]
        hashes.append(found["sha256"])
    assert hashes[0] == hashes[1]
