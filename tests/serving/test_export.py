"""Exported models give the probabilities of the predictor."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from dist_train import load
from dist_train.data.cells.dates import PARTS, date_part
from dist_train.data.cells.readings import Reading
from dist_train.data.encoding.scaling import scaled
from dist_train.data.encoding.spec import FeatureSpec, NumericColumn
from dist_train.serving.encoding import ByQuantiles, DateParts
from dist_train.serving.export import TOLERANCE, sample_rows, typed_rows
from dist_train.serving.normal_quantile import normal_quantile
from tests.cli.in_process import command
from tests.commands import REPOSITORY
from tests.serving.conftest import PLAIN, exported

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

MODELS = {
    "default": ["model.hidden_dim=8"],
    "embedded": ["model.hidden_dim=8", "model.embedding_dim=3", "calibration.method=vector"],
    "resnet": [
        "model.name=resnet", "model.resnet.width=8", "data.numeric_transform=quantile", "calibration.method=isotonic",
    ],
    "tabm": [
        "model.name=tabm", "model.tabm.width=8", "model.tabm.members=3", "model.tabm.blocks=2",
        "model.tabm.numeric_embedding=piecewise_linear", "model.tabm.numeric_width=4",
        "model.tabm.one_hot_categories=2",
    ],
    "folds": ["model.hidden_dim=8", "data.folds=2"],
}  # fmt: skip


@pytest.mark.slow  # the exporter of torch takes some ten seconds for each
@pytest.mark.parametrize("name", MODELS)
def test_onnx_of_every_model_and_kind_of_column(name: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    run = model_of(name, *MODELS[name])
    assert_same_probabilities(run, exported(run, tmp_path / "model.onnx"), 10_000, 3 if name == "resnet" else 1)


def test_onnx_gives_the_probabilities_of_the_predictor(model_of: Callable[..., Path], plain_onnx: Path) -> None:
    assert_same_probabilities(model_of("plain"), plain_onnx, 3000)


def assert_same_probabilities(run: Path, file: Path, num_rows: int, steepness: float = 1) -> None:
    session = onnxruntime.InferenceSession(file)
    predictor = load(run)
    spec = predictor.members[0].task.spec  # type: ignore[attr-defined]
    rows = sample_rows(spec, num_rows)
    inputs = {
        value.name: rows[value.name].to_numpy()[:, None].astype(np.float64)
        if value.type == "tensor(double)"
        else np.array(rows[value.name].to_list(), object)[:, None]
        for value in session.get_inputs()
    }
    probabilities = session.run(None, inputs)[0]
    np.testing.assert_allclose(
        probabilities, predictor.predict_proba(typed_rows(rows, spec)), rtol=0, atol=TOLERANCE * steepness
    )
    one = session.run(None, {key: value[:1] for key, value in inputs.items()})[0]
    np.testing.assert_allclose(one, probabilities[:1], rtol=0, atol=TOLERANCE)
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["classes"] == predictor.class_names
    assert [column["name"] for column in metadata["columns"]] == [value.name for value in session.get_inputs()]
    assert all(len(hashes["weights_sha256"]) == 64 for hashes in metadata["hashes"])


def test_pt2_gives_the_probabilities_of_the_predictor(model_of: Callable[..., Path], tmp_path: Path) -> None:
    file = exported(model_of("plain", *PLAIN), tmp_path / "model.pt2")
    extra = {"dist_train.json": ""}
    program = torch.export.load(file, extra_files=extra)
    assert json.loads(extra["dist_train.json"])["classes"] == ["no", "yes"]
    inputs = [torch.zeros(5, shape.shape[1], dtype=shape.dtype) for shape in program.example_inputs[0]]
    assert program.module()(*inputs).shape == (5, 2)


@pytest.mark.slow  # exports
def test_a_triton_repository_declares_the_inputs_of_its_file(model_of: Callable[..., Path], tmp_path: Path) -> None:
    run = model_of("plain", *PLAIN)
    folder = exported(run, tmp_path / "risk", "--triton")
    declared = (folder / "config.pbtxt").read_text()
    assert declared.startswith('name: "risk"\nbackend: "onnxruntime"\n')
    for column in onnxruntime.InferenceSession(folder / "1" / "model.onnx").get_inputs():
        kind = "TYPE_FP64" if column.type == "tensor(double)" else "TYPE_STRING"
        assert f'input [ {{ name: "{column.name}" data_type: {kind} dims: [ 1 ] }} ]' in declared
    again = command("export", run, folder, "--triton")
    assert again.code == 2
    assert "is there already" in again.err


def test_the_script_of_the_docs_scores_without_torch_and_without_this_project(
    model_of: Callable[..., Path], plain_onnx: Path, tmp_path: Path
) -> None:
    run = model_of("plain", *PLAIN)
    text = (REPOSITORY / "docs" / "scoring.md").read_text()
    script = re.search(r"```python\n(# score\.py.*?)```", text, re.DOTALL)
    assert script
    (tmp_path / "score.py").write_text(script[1] + "\nassert not {'torch', 'dist_train'} & {*sys.modules}\n")
    rows = pl.read_parquet(run.parent.parent / "table.parquet").head(20)
    plain = rows.with_columns(pl.col("limit").str.replace_all("[, EUR]", ""))
    plain.write_csv(tmp_path / "clients.csv")
    done = subprocess.run(
        [sys.executable, "score.py", plain_onnx, "clients.csv"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.array([[float(cell) for cell in line.split(",")] for line in done.stdout.splitlines()[1:]])
    np.testing.assert_allclose(found, load(run).predict_proba(rows), rtol=0, atol=TOLERANCE)


def test_what_cannot_be_exported_is_refused(model_of: Callable[..., Path], tmp_path: Path) -> None:
    run = model_of("hashed", "model.hidden_dim=8", "data.max_categories=2", "data.hash_buckets=4")
    outcome = command("export", run, tmp_path / "model.onnx")
    assert outcome.code == 2
    assert "column 'purpose': categories beyond data.max_categories" in outcome.err
    outcome = command("export", run, tmp_path / "model.bin")
    assert outcome.code == 2
    assert "must end in .onnx or .pt2" in outcome.err
    assert not list(tmp_path.iterdir())


def test_the_normal_quantile_is_that_of_torch() -> None:
    random = torch.rand(100_000, dtype=torch.float64)
    shares = torch.cat([random, 10 ** (-12 * random), 1 - 10 ** (-12 * random)])
    torch.testing.assert_close(normal_quantile(shares), torch.special.ndtri(shares), rtol=0, atol=1e-12)


def test_parts_of_dates_are_those_of_the_encoder() -> None:
    random = np.random.default_rng(0)
    seconds = random.uniform(-6e10, 6e10, 20_000).round(3)  # the years 68 to 3871
    seconds[:10_000] = np.floor(seconds[:10_000] / 60) * 60
    parts = tuple(part for parts in PARTS for part in parts)
    module = DateParts([Reading(column="since", form="date", parts=parts, reference=1e9)], ["since"])
    found = module(torch.from_numpy(seconds)[:, None]).numpy()
    for index, part in enumerate(parts):
        expected = date_part(pl.Series(seconds), part, 1e9).to_numpy()
        np.testing.assert_allclose(found[:, index], expected, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(found[:10_000, index], expected[:10_000])


def test_numbers_are_scaled_by_quantiles_as_the_encoder_does() -> None:
    random = np.random.default_rng(0)
    columns = [random.normal(size=500), random.integers(0, 9, 500) / 3.0, np.full(500, 2.5)]
    quantiles = [np.quantile(values, np.linspace(0, 1, 257), method="nearest") for values in columns]
    numeric = tuple(
        NumericColumn(
            name=f"c{i}",
            median=0.0,
            scale=float(q[-1] > q[0]),
            has_missing_flag=False,
            quantiles=tuple(q.tolist()),
            transform="quantile",
        )
        for i, q in enumerate(quantiles)
    )
    rows = np.concatenate([np.stack(columns, 1), np.stack(quantiles, 1), random.normal(0, 1e3, (500, 3))])
    rows[-1] = [3.4e38, -3.4e38, 3.4e38]
    values = torch.from_numpy(rows)
    found = ByQuantiles(FeatureSpec(numeric=numeric, categorical=(), class_names=("a", "b")))(values)
    for index, column in enumerate(numeric):
        expected = scaled(values[:, index].contiguous(), column)
        torch.testing.assert_close(found[:, index], expected, rtol=0, atol=1e-12)
