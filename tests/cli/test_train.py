"""`launch/train.py` as a user types it, alone and under torchrun: the run folder that outside programs rely on."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cli.in_process import command
from tests.commands import REPOSITORY, run

CREDIT_RISK = REPOSITORY / "configs" / "credit_risk.yaml"
SHORT = ("train.max_steps=75", "checkpoint.every_steps=40", "log.every_steps=25", "runtime.device=cpu")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the default job under torchrun on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    done = run(
        "train", CREDIT_RISK, *SHORT, "wandb.mode=offline", f"run.dir={folder}", ranks=2, NETRC=str(folder / "none")
    )
    assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    (folder / "stdout").write_text(done.stdout)
    return folder / "credit_risk"


def test_the_run_folder_is_as_promised(run_dir: Path) -> None:
    assert {p.name for p in run_dir.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "model", "wandb", "lock", "split.json",
        "split.parquet", "witness.jsonl",
    }  # fmt: skip
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_00000071", "step_00000075"]
    assert {p.name for p in (run_dir / "model").iterdir()} >= {"model.pth", "task.json"}
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1


def test_every_line_of_metrics_has_what_is_relied_on(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line.keys() >= {"step", "epoch", "samples", "split", "loss"} for line in lines)
    assert [(line["step"], line["split"]) for line in lines] == [
        (25, "train"), (50, "train"), (71, "valid"), (75, "train"), (75, "valid"),
    ]  # fmt: skip
    assert [line["samples"] for line in lines] == sorted(line["samples"] for line in lines)
    assert lines[-1]["epoch"] == 2


def test_the_summary_has_what_is_relied_on(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["steps"] == 75
    assert summary["samples_per_second"] > 0
    assert summary["test"].keys() >= {"loss", "accuracy", "macro_f1", "auroc"}


def test_the_model_loads_into_plain_torch_and_has_the_digest_of_the_summary(run_dir: Path) -> None:
    state = torch.load(run_dir / "model" / "model.pth", weights_only=True)
    width, input_dim = state["layers.0.weight"].shape

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(input_dim, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3),
                nn.Linear(width, width // 2), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width // 2, 3),
            )  # fmt: skip

    Plain().load_state_dict(state, strict=True)
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
    assert json.loads((run_dir / "summary.json").read_text())["weights_sha256"] == digest


def test_piped_output_is_plain_lines_of_rank_0(run_dir: Path) -> None:
    text = (run_dir.parent / "stderr").read_text()
    assert (run_dir.parent / "stdout").read_text() == ""
    assert "\x1b" not in text
    ours = [line for line in text.splitlines() if re.match(r"\d\d:\d\d:\d\d \[rank", line)]
    assert all("[rank 0]" in line for line in ours)
    assert sum("step 25/75" in line for line in ours) == 1
    assert sum("parameters" in line and "trainable" in line for line in ours) == 1
    assert "Traceback" not in text


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    done = command("train", CREDIT_RISK, f"run.dir={tmp_path / 'runs'}", "runtime.device=cpu", "--dry-run")
    assert done.code == 0, done.err
    for word in ("world", "rows", "parameters", "steps", "rate", "peak", "speed"):
        assert word in done.err, word
    assert list(tmp_path.iterdir()) == []


def test_the_debug_configuration_trains_in_one_process_and_always_anew(tmp_path: Path) -> None:
    for _ in range(2):
        done = command(
            "train", CREDIT_RISK, REPOSITORY / "configs" / "debug.yaml", f"run.dir={tmp_path}", "runtime.device=cpu"
        )
        assert done.code == 0, done.err
    assert json.loads((tmp_path / "debug" / "summary.json").read_text())["world_size"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["debug", "debug.old-1"]
