"""predict and evaluate on a trained run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from dist_train.distributed.world import World, world_from_environment
from tests import commands
from tests.cli.conftest import Trained
from tests.cli.in_process import command, command_on_ranks
from tests.cli.tables import CLASSES, clients

FEATURES = ["income", "age", "purpose", "utilisation"]


def write(frame: pl.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    return path


def predicted(trained: Trained, frame: pl.DataFrame, folder: Path, *, kind: str = "parquet") -> pl.DataFrame:
    source, output = write(frame, folder / f"in.{kind}"), folder / f"out.{kind}"
    outcome = command("predict", trained.folder, source, output)
    assert outcome.code == 0, outcome.err
    assert not outcome.out or json.loads(outcome.out)["rows"] == frame.height  # only where something is unfamiliar
    assert sorted(path.name for path in folder.iterdir()) == [source.name, output.name]
    return pl.read_csv(output) if kind == "csv" else pl.read_parquet(output)


@pytest.fixture(scope="module")
def reference(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    return predicted(trained, clients(), tmp_path_factory.mktemp("reference"))


def test_each_row_has_the_probabilities_of_all_classes_and_the_likeliest_class(reference: pl.DataFrame) -> None:
    assert reference.columns == [*(f"probability_{name}" for name in CLASSES), "predicted_class"]
    assert reference.height == clients().height
    probabilities = reference.drop("predicted_class").to_numpy()
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=0, atol=1e-6)
    assert probabilities.min() >= 0
    assert reference["predicted_class"].to_list() == [CLASSES[i] for i in probabilities.argmax(1)]
    assert reference["predicted_class"].n_unique() > 1


def test_csv_and_parquet_give_the_same_probabilities(trained: Trained, reference: pl.DataFrame, tmp_path: Path) -> None:
    from_csv = predicted(trained, clients(), tmp_path, kind="csv")
    assert from_csv.columns == reference.columns
    assert from_csv["predicted_class"].equals(reference["predicted_class"])
    for name in CLASSES:
        column = f"probability_{name}"
        assert from_csv[column].cast(reference[column].dtype).equals(reference[column])


def test_the_order_of_rows_is_kept(trained: Trained, reference: pl.DataFrame, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(clients().height)
    np.testing.assert_allclose(
        predicted(trained, clients()[order], tmp_path).drop("predicted_class").to_numpy(),
        reference[order].drop("predicted_class").to_numpy(),
        rtol=1e-6,
    )


def test_target_further_columns_and_the_order_of_columns_do_not_matter(
    trained: Trained, reference: pl.DataFrame, tmp_path: Path
) -> None:
    frame = clients().select(*reversed(FEATURES)).with_columns(client=pl.int_range(pl.len()), when=pl.date(2020, 1, 1))
    assert predicted(trained, frame, tmp_path).equals(reference)


def test_unknown_categories_and_missing_cells_are_scored(
    trained: Trained, reference: pl.DataFrame, tmp_path: Path
) -> None:
    frame = clients().with_columns(
        purpose=pl.when(pl.int_range(pl.len()) < 5).then(pl.lit("spaceship")).otherwise("purpose"),
        income=pl.when(pl.int_range(pl.len()).is_between(5, 9)).then(None).otherwise("income"),
        age=pl.when(pl.int_range(pl.len()).is_between(5, 9)).then(None).otherwise("age"),
    )
    for kind in ("csv", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        found = predicted(trained, frame, folder, kind=kind)
        assert found.null_count().sum_horizontal().item() == 0
        assert found[:, :3].to_numpy().min() >= 0
        np.testing.assert_allclose(found[10:, :3].to_numpy(), reference[10:, :3].to_numpy(), rtol=1e-6)
        assert not np.allclose(found[:10, :3].to_numpy(), reference[:10, :3].to_numpy(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_missing_cells_alone_is_scored(kind: str, trained: Trained, tmp_path: Path) -> None:
    nothing = pl.DataFrame({name: pl.Series([None, None], dtype=pl.String) for name in FEATURES})
    found = predicted(trained, nothing, tmp_path, kind=kind)
    assert found.height == 2
    assert found.row(0) == found.row(1)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_no_rows_in_are_no_rows_out(kind: str, trained: Trained, reference: pl.DataFrame, tmp_path: Path) -> None:
    found = predicted(trained, clients().clear(), tmp_path, kind=kind)
    assert found.columns == reference.columns
    assert found.height == 0


def test_an_output_that_is_there_is_replaced(trained: Trained, reference: pl.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_text("an older file")
    assert predicted(trained, clients(), tmp_path).equals(reference)


def test_the_checkpoint_of_the_best_step_holds_the_weights_that_are_shipped(
    trained: Trained, reference: pl.DataFrame, tmp_path: Path
) -> None:
    source, output = write(clients(), tmp_path / "in.parquet"), tmp_path / "out.parquet"
    best = json.loads((trained.folder / "summary.json").read_text())["best_step"]
    outcome = command("predict", trained.folder, source, output, "--checkpoint", best)
    assert outcome.code == 0, outcome.err
    assert pl.read_parquet(output).equals(reference)


def evaluated(trained: Trained, *arguments: object) -> dict[str, dict[str, Any]]:
    outcome = command("evaluate", trained.folder, *arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1
    assert outcome.out.endswith("}\n")
    found: dict[str, dict[str, Any]] = json.loads(outcome.out, parse_constant=_no_json)
    return found


def flat(metrics: Any) -> dict[str, float]:
    """Every number of nested metrics by its path."""
    if not isinstance(metrics, (dict, list)):
        return {"": metrics}
    items = metrics.items() if isinstance(metrics, dict) else enumerate(metrics)
    return {f"{name}/{path}": value for name, inner in items for path, value in flat(inner).items()}


def _no_json(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def test_a_run_of_another_machine_is_scored_on_this_one(
    trained: Trained, reference: pl.DataFrame, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    config = (folder / "config.yaml").read_text().replace("device: cpu", "device: cuda")
    (folder / "config.yaml").write_text(config.replace("backend: auto", "backend: nccl"))
    outcome = command("evaluate", folder)
    assert outcome.code == 0, outcome.err
    assert flat(json.loads(outcome.out)["test"]) == pytest.approx(flat(evaluated(trained)["test"]), abs=1e-6)
    outcome = command("predict", folder, write(clients(), tmp_path / "in.csv"), tmp_path / "out.parquet")
    assert outcome.code == 0, outcome.err
    found = pl.read_parquet(tmp_path / "out.parquet")
    np.testing.assert_allclose(found[:, :3].to_numpy(), reference[:, :3].to_numpy(), rtol=1e-5)


@pytest.mark.parametrize("script", ["evaluate", "predict"])
def test_a_run_that_was_kept_off_the_gpu_is_scored_on_the_cpu(
    script: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def note(environ: Mapping[str, str], *, device: str = "auto") -> World:
        asked.append(device)
        return world_from_environment(environ, device=device)

    monkeypatch.setattr("dist_train.run.scoring.predictor.world_from_environment", note)
    more = [write(clients(), tmp_path / "in.csv"), tmp_path / "out.csv"] if script == "predict" else []
    assert command(script, trained.folder, *more).code == 0
    assert asked == ["cpu"]


def test_evaluate_prints_one_line_of_json_that_equals_the_summary(trained: Trained) -> None:
    summary = json.loads((trained.folder / "summary.json").read_text())
    for split in ("test", "valid"):
        found = evaluated(trained, "--split", split)
        assert list(found) == [split]
        assert flat(found[split]) == pytest.approx(flat(summary[split]), abs=1e-9)
    assert evaluated(trained) == evaluated(trained, "--split", "test")


def test_evaluate_on_another_file_scores_what_predict_predicts(
    trained: Trained, reference: pl.DataFrame, tmp_path: Path
) -> None:
    frame = clients()
    metrics = evaluated(trained, "--data", write(frame, tmp_path / "all.csv"))["test"]
    probabilities = reference.drop("predicted_class").to_numpy().astype(np.float64)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(frame["tier"], reference["predicted_class"]), abs=1e-9)
    expected = log_loss(frame["tier"], probabilities / probabilities.sum(1, keepdims=True), labels=list(CLASSES))
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))


def test_the_table_for_people_names_the_classes(trained: Trained) -> None:
    outcome = command("evaluate", trained.folder)
    assert all(f"class {name}" in outcome.err for name in CLASSES)
    assert "error" not in outcome.err.replace("calibration_error", "")


def test_real_processes_give_the_same(trained: Trained, reference: pl.DataFrame, tmp_path: Path) -> None:
    source, output = write(clients(), tmp_path / "in.csv"), tmp_path / "out.parquet"
    done = commands.run("predict", trained.folder, source, output)
    assert done.returncode == 0, done.stderr
    # Another number of threads may sum in another order.
    found = pl.read_parquet(output)
    np.testing.assert_allclose(found[:, :3].to_numpy(), reference[:, :3].to_numpy(), rtol=1e-5)
    done = commands.run("evaluate", trained.folder)
    assert done.returncode == 0, done.stderr
    assert flat(json.loads(done.stdout)["test"]) == pytest.approx(flat(evaluated(trained)["test"]), abs=1e-6)


def test_the_weights_load_into_a_plain_module(trained: Trained) -> None:
    weights = torch.load(trained.folder / "model" / "model.pth", weights_only=True)
    width = weights["layers.0.weight"].shape[1]
    layers = torch.nn.Sequential(
        torch.nn.Linear(width, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.3),
        torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(4, 3),
    )  # fmt: skip
    matched = torch.nn.ModuleDict({"layers": layers}).load_state_dict(weights, strict=True)
    assert not matched.missing_keys + matched.unexpected_keys


def test_two_ranks_predict_what_one_does(trained: Trained, reference: pl.DataFrame, tmp_path: Path) -> None:
    source, output = write(clients(), tmp_path / "in.parquet"), tmp_path / "out.parquet"
    done = command_on_ranks(2, "predict", trained.folder, source, output)
    assert [rank.code for rank in done] == [0, 0], done
    assert pl.read_parquet(output).equals(reference)
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, output.name]
