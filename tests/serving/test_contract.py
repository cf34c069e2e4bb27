"""A table and records are judged by one contract."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from dist_train import load
from dist_train.serving.onnx_model import OnnxModel
from tests.commands import REPOSITORY
from tests.serving.conftest import PLAIN, everything, exported


def unlike_training() -> pl.DataFrame:
    rows = pl.int_range(pl.len())
    return everything().head(60).with_columns(
        age=pl.when(rows < 7).then(1000).when(rows < 12).then(-3).when(rows < 14).then(None).otherwise("age"),
        income=pl.when(rows < 5).then(1e-6).otherwise("income"),
        purpose=pl.when(rows < 9).then(pl.lit("boat")).when(rows < 11).then(None).otherwise("purpose"),
        limit=pl.when(rows < 4).then(pl.lit("9,999,999,999.00 EUR")).otherwise("limit"),
        flat=pl.lit(3.5),
    )  # fmt: skip


@pytest.mark.parametrize("transform", ["robust", "quantile"])
def test_a_table_and_records_are_judged_alike(
    model_of: Callable[..., Path], tmp_path: Path, plain_onnx: Path, transform: str
) -> None:
    if transform == "robust":
        run, file = model_of("plain", *PLAIN), plain_onnx
    else:
        run = model_of("plain_quantile", *PLAIN, "data.numeric_transform=quantile")
        file = exported(run, tmp_path / "model.onnx")
    frame = unlike_training()
    task = load(run).members[0].task
    table = frame.select(task.input_columns).with_columns(pl.col("owner").cast(pl.String))
    found = task.unfamiliar(task.unlabelled(table, "t"), table)
    model = OnnxModel(file)
    amounts = pl.col("limit").str.replace_all(",", "").str.strip_suffix(" EUR").cast(pl.Float64)
    plain = table.with_columns(amounts, pl.col("branch").cast(pl.Float64))
    problems = Counter((p["column"], p["problem"]) for p in model.problems(model.cells(plain.to_dicts())))
    by_kind: dict[str, Counter[str]] = {"unknown": Counter(), "missing": Counter(), "outside": Counter()}
    for (column, problem), number in problems.items():
        kind = "unknown" if "category" in problem else "missing" if "missing" in problem else "outside"
        by_kind[kind][column] += number
    assert by_kind["unknown"] == +Counter(found.unknown_cells)
    assert by_kind["outside"] == +Counter(found.outside_cells)
    assert by_kind["outside"].keys() == {"age", "income", "limit"}
    assert by_kind["missing"] == +Counter({name: found.missing_cells[name] for name in found.never_missing})


def test_a_server_loads_neither_torch_nor_polars() -> None:
    code = "import sys, dist_train.serving.onnx_model as m; print({'torch', 'polars'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert found.stdout == "set()\n"
