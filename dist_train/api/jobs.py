"""Configurations, training and trained models, for Python programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_train.api.isolation import isolated
from dist_train.config import load as loading
from dist_train.config.run_path import path_of_run
from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.stopping import Launcher
from dist_train.distributed.world import device_here, world_from_environment
from dist_train.errors import UserError
from dist_train.run import job
from dist_train.run.scoring.predictor import Predictor
from dist_train.run.scoring.stored_model import runtime_of

File = str | os.PathLike[str]
Config = JobConfig | File | Sequence[File] | None
"""A configuration, a YAML file, several of them (merged from left to right), or None: the defaults."""


@dataclass(frozen=True)
class TrainResult:
    """What a job has left.

    `run_dir` is the run folder. `summary` is the content of its summary.json (metrics, rows per second, SHA-256 of the
    weights); empty where the job was stopped on request, and then the same call continues it.
    """

    run_dir: Path
    summary: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    def model(self) -> Predictor:
        """The trained model: that of the best checkpoint."""
        return load(self.run_dir)


def load_config(config: Config = None, overrides: Sequence[str] = ()) -> JobConfig:
    """A configuration, complete and checked.

    `overrides` are `key=value` as on the command line; they come after all files.

        >>> from dist_train import load_config
        >>> load_config(overrides=["optim.lr=3e-4"]).optim.lr
        0.0003

    Raises:
        UserError: a file cannot be read, or a key or a value is wrong; it lists every mistake.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides: must be a list of key=value, is the text {overrides!r}")
    if isinstance(config, JobConfig):
        return loading.load_config(overrides, base=config)
    files: Sequence[File] = [] if config is None else [config] if isinstance(config, (str, os.PathLike)) else config
    return loading.load_config([*(os.fspath(file) for file in files), *overrides])


def train(config: Config = None, overrides: Sequence[str] = (), *, verbose: bool = True) -> TrainResult:
    """Train a job to its end, in this process; under torchrun, with the other ranks.

    It is the same job as `dist-train train`: the same call continues a run that was interrupted, and a run that is
    finished is left alone. In the main thread SIGTERM, SIGINT (Ctrl-C), SIGUSR1, SIGUSR2 and SIGHUP stop it at the
    next step with everything saved; the former handlers are put back. A program with several ranks calls it in each
    of them; a rank that fails or hangs then ends all of them, as it does under the command. `verbose` shows the
    log lines.

    Raises:
        UserError: the configuration or the data have a mistake; nothing has been written.
        TrainingFault: training cannot go on, as with a loss that is not finite.
    """
    resolved = load_config(config, overrides)
    if dist.is_available() and dist.is_initialized():
        raise UserError("torch.distributed has a process group already, and a job opens its own: destroy it first")
    runtime = resolved.runtime
    with isolated(verbose=verbose):
        world = world_from_environment(
            os.environ, device=runtime.device, backend=runtime.backend, timeout_seconds=runtime.timeout_seconds
        )
        launcher = Launcher() if "TORCHELASTIC_RUN_ID" in os.environ else None
        summary = job.train(resolved, world, os.environ, launcher=launcher)
    return TrainResult(path_of_run(resolved), summary or {})


def load(folder: File, checkpoint: str = "best", *, device: str = "auto", calibrated: bool | None = None) -> Predictor:
    """A trained model, from a run folder, from its `model/`, from a copy of that, or from `Classifier.save`.

    `checkpoint` is `best` (by `train.select_by`), `last`, or a step; only a run folder has others than the best
    one. `device` is `auto`, `cpu` or `cuda`. `calibrated` says whether probabilities are calibrated; None: as
    `calibration.apply` of the run says.

        predictor = load("runs/loans")
        predictor.predict_proba([{"income": 3000, "purpose": "car"}])     # (1, classes), in the order of classes_
        predictor.evaluate(data="new_clients.parquet")["auroc"]

    Raises:
        UserError: there is no such model or checkpoint, or it does not verify.
    """
    path = Path(folder)
    chosen = device_here(runtime_of(path).device) if device == "auto" else device
    return Predictor(path, Collectives(world_from_environment({}, device=chosen)), checkpoint, calibrated=calibrated)
