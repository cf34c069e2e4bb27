"""A model in shards on two ranks trains as its replicas do, and its checkpoints are theirs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.distributed.collectives import Collectives
from dist_train.run.checkpoint.commit import commit
from dist_train.run.checkpoint.state import Parts, encode_parts, read_parts
from tests.cli.in_process import command, command_on_ranks
from tests.dist.sessions import Trained, train, write_table
from tests.models.tiny_bert import write_texts, write_tiny_bert
from tests.models.tiny_llama import write_tiny_llama
from tests.ranks import on_ranks, preload
from tests.resume.jobs import Trap, finish, folder_of, run_job
from tests.run.forging import forge_chain
from tests.tasks.text_jobs import instruction_job, needs_text_libraries, refused, text_job

preload("tests.models.text_libraries")
preload("dist_train.execution.fsdp")

FSDP = "runtime.fsdp=true"
# 62 training rows: one rank of two has no row of the last batch. Odd shapes: no tensor is cut in equal shards.
JOB = (
    "train.max_steps=9", "train.global_batch_size=10", "train.accumulation_steps=2", "train.ema_decay=0.9",
    "optim.max_grad_norm=0.1", "checkpoint.every_steps=3", "log.every_steps=1", "data.test_fraction=0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return write_tiny_bert(folder / "bert"), write_texts(folder / "texts.csv", 90)


@pytest.fixture(scope="module")
def replicas(place: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return finish(text_job(*place, tmp_path_factory.mktemp("replicas") / "run", *JOB), 2)


def assert_alike(outcome: dict[str, Any], other: dict[str, Any]) -> None:
    assert len(outcome["lines"]) == len(other["lines"])
    for ours, theirs in zip(outcome["lines"], other["lines"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert outcome["test"]["loss"] == pytest.approx(other["test"]["loss"], abs=1e-5)


@needs_text_libraries
def test_adapters_in_shards_train_as_replicas_do_after_a_kill_and_go_on_as_replicas(
    place: tuple[Path, Path], replicas: dict[str, Any], tmp_path: Path
) -> None:
    job = text_job(*place, tmp_path / "run", *JOB)
    assert run_job([*job, FSDP], 2, Trap(step=4)).killed
    ended = run_job([*job, FSDP], 2, Trap(step=6, signal=signal.SIGTERM, rank=1))
    assert ended.codes == [0, 0], ended.errors
    assert (folder_of(job) / "requeue").is_file()
    assert_alike(finish(job, 2), replicas)


@needs_text_libraries
def test_replicas_go_on_in_shards_and_ship_what_replicas_ship(
    place: tuple[Path, Path], replicas: dict[str, Any], tmp_path: Path
) -> None:
    job = text_job(*place, tmp_path / "run", *JOB)
    assert run_job(job, 2, Trap(step=4)).killed
    assert_alike(finish([*job, FSDP, "train.gradient_checkpointing=true"], 2), replicas)
    model = folder_of(job) / "model"
    assert (model / "adapter_model.safetensors").is_file()
    summary = json.loads((folder_of(job) / "summary.json").read_text())
    assert summary["parameters"] > summary["trainable_parameters"] > 0


@needs_text_libraries
def test_a_run_in_shards_is_verified_on_as_many_ranks_and_on_no_other_number(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    job = [*text_job(*place, tmp_path / "run", *JOB, "checkpoint.keep=1"), FSDP]
    summary = finish(job, 2)
    seen = command_on_ranks(2, "verify", folder_of(job))
    assert [rank.code for rank in seen] == [0, 0], seen
    report = json.loads(seen[0].out)
    assert (report["difference"], report["notes"], report["model_compared"]) == (None, [], True)
    assert report["checkpoints"] >= 1
    assert report["states"] >= 1
    assert report["weights_sha256"] == summary["weights_sha256"]
    refused(command("verify", folder_of(job)), "trained in the fast mode on 2 ranks")

    checkpoint = folder_of(job) / "checkpoints" / "step_00000009"
    parts: Parts = read_parts(checkpoint)
    altered = next(name for name, tensor in parts["optimizer.pth"].items() if tensor.is_floating_point())
    parts["optimizer.pth"][altered] += 1e-6
    commit(checkpoint, encode_parts(parts))
    forge_chain(folder_of(job))
    seen = command_on_ranks(2, "verify", folder_of(job), "--steps", "6:9")
    assert [rank.code for rank in seen] == [1, 1], seen
    assert json.loads(seen[0].out)["difference"] == (
        f"the checkpoint's optimizer.pth, tensor {altered} is not what the replay has"
    )


@needs_text_libraries
def test_a_run_that_left_its_shards_is_verified_from_there_on(place: tuple[Path, Path], tmp_path: Path) -> None:
    job = text_job(*place, tmp_path / "run", *JOB, "checkpoint.keep=9")
    assert run_job([*job, FSDP], 2, Trap(step=4)).killed
    finish(job, 2)
    seen = command_on_ranks(2, "verify", folder_of(job))
    assert [rank.code for rank in seen] == [0, 0], seen
    report = json.loads(seen[0].out)
    assert (report["difference"], report["first_step"]) == (None, 3)
    assert report["notes"] == ["changed at step 3: runtime.fsdp: was True, is False"]


@needs_text_libraries
@pytest.mark.slow
def test_a_causal_model_in_shards_trains_as_replicas_do(tmp_path: Path) -> None:
    place = write_tiny_llama(tmp_path / "llama"), write_texts(tmp_path / "texts.csv", 60)
    more = ("train.max_steps=4", "log.every_steps=1", "train.gradient_checkpointing=true")
    ours, theirs = (
        finish(instruction_job(*place, tmp_path / name, *more, f"runtime.fsdp={name}"), 2) for name in ("true", "false")
    )
    assert_alike(ours, theirs)


def trained(collectives: Collectives, arguments: list[str]) -> Trained:
    return train(collectives, arguments)


@pytest.mark.parametrize("family", ["financial_classifier", "resnet"])
def test_other_models_train_as_replicas_do(family: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.parquet", 121)
    job = [*table, "train.global_batch_size=24", "train.epochs=2", "train.precision=float64", f"model.name={family}"]
    ours, theirs = (on_ranks(2, trained, [*job, *more])[0] for more in ([FSDP], []))
    assert len(ours.losses) == 10
    assert np.abs(ours.losses - theirs.losses).max() < 1e-9
    assert np.abs(ours.probabilities - theirs.probabilities).max() < 1e-9
    for name, value in theirs.weights.items():
        assert np.abs(ours.weights[name] - value).max() < 1e-7, name
