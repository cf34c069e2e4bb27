"""Training from Python: one process, several ranks, and runs that are stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dist_train import UserError, load_config, register_metric, train
from tests.api.tables import QUICK, loans
from tests.commands import environment
from tests.ranks import free_port, in_processes


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """A job on a small table."""
    table, risk = loans()
    table.with_columns(risk).write_parquet(tmp_path / "loans.parquet")
    return [
        *QUICK,
        f"data.path={tmp_path / 'loans.parquet'}",
        "data.target=risk",
        f"run.dir={tmp_path}",
        "runtime.device=cpu",
        "wandb.mode=disabled",
        "train.epochs=2",
        "train.global_batch_size=16",
    ]


def test_a_job_and_its_result(settings: list[str], tmp_path: Path) -> None:
    config = load_config(overrides=settings)
    result = train(config, ["optim.lr=0.01"], verbose=False)
    assert result.finished
    assert result.run_dir == tmp_path / "run"
    assert result.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.model().predict_proba(loans()[0]).shape == (120, 3)
    assert train(config, ["optim.lr=0.01"], verbose=False) == result, "a run that is finished is left alone"
    with pytest.raises(UserError, match=r"optim\.lr: was 0\.01, is 0\.001"):
        train(config, verbose=False)


def test_a_file_and_overrides(settings: list[str], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("optim: {lr: 0.1}\nrun: {name: of_file}\n")
    assert load_config(file).optim.lr == 0.1
    assert load_config([str(file)], ["optim.lr=0.2"]).optim.lr == 0.2
    assert load_config(load_config(file), ["run.seed=4"]).optim.lr == 0.1
    assert train(file, settings, verbose=False).run_dir == tmp_path / "of_file"
    with pytest.raises(UserError, match="must be a list of key=value"):
        load_config(file, "optim.lr=1")


def test_a_signal_stops_it_and_the_same_call_continues(settings: list[str]) -> None:
    register_metric("quiet")(lambda *_: 0)
    whole = train(overrides=[*settings, "run.name=whole", "evaluation.metrics=[quiet]"], verbose=False)

    @register_metric("quiet")
    def terminating(*_: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    job = [*settings, "run.name=stopped", "evaluation.metrics=[quiet]", "evaluation.every_steps=3"]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stopped = train(overrides=job, verbose=False)
    assert not stopped.finished
    assert (stopped.run_dir / "requeue").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    register_metric("quiet")(lambda *_: 0)
    continued = train(overrides=job, verbose=False)
    assert continued.finished
    assert continued.summary["steps"] == whole.summary["steps"]


OWN = """
import torch
from dist_train import register_loss, register_metric

@register_loss("own")
def own(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none") ** 2

register_metric("own")(lambda probabilities, targets, class_names: probabilities[:, 0].max())
"""
RANKS = """
import json, sys
import torch, torch.distributed as dist
from dist_train import train
threads = torch.get_num_threads()
result = train(overrides=sys.argv[1:], verbose=False)
assert not dist.is_initialized()
assert torch.get_num_threads() == threads
print(json.dumps(dict(result.summary)))
"""


def _rank(rank: int, port: int, job: list[str]) -> str:
    """What RANKS prints on a rank, in the environment that torchrun gives it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.clear()
    os.environ.update(environment(MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in place.items()}))
    sys.argv = ["job.py", *job]
    with redirect_stdout(StringIO()) as printed:
        exec(OWN + RANKS, {})
    return printed.getvalue()


def test_two_ranks_give_the_bits_of_one_process(settings: list[str]) -> None:
    job = [*settings, "train.virtual_ranks=2", "train.loss=own", "evaluation.metrics=[own]"]
    summaries = [json.loads(printed) for printed in in_processes(2, _rank, free_port(), job)]
    assert summaries[0] == summaries[1]
    assert summaries[0]["world_size"] == 2
    exec(OWN, {})
    alone = train(overrides=[*job, "run.name=alone"], verbose=False)
    assert alone.summary["valid"] == summaries[0]["valid"]
    assert "own" in alone.summary["valid"]
    assert alone.summary["weights_sha256"] == summaries[0]["weights_sha256"]
