"""What rank 0 writes about a run while it trains: metrics.jsonl, wandb, TensorBoard, MLflow, curves, the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_train.config.schema import JobConfig
from dist_train.run.tracking.console_tracker import ConsoleTracker
from dist_train.run.tracking.curves_tracker import CurvesTracker
from dist_train.run.tracking.jsonl_tracker import JsonlTracker
from dist_train.run.tracking.mlflow_tracker import MlflowTracker
from dist_train.run.tracking.tensorboard_tracker import TensorBoardTracker
from dist_train.run.tracking.wandb_tracker import WandbTracker, choose_mode
from dist_train.system.console import terminal
from dist_train.training.selection import Selection

_SERVER_SECONDS = 30.0
"""How long a server of wandb may take to answer."""


class Trackers:
    """All trackers of a run, on rank 0.

    `state` is the `state.json` of the checkpoint that the run goes on from, None: it begins.
    """

    def __init__(
        self,
        config: JobConfig,
        metrics_file: Path,
        *,
        total_steps: int,
        start_step: int,
        best_value: float | None,
        selection: Selection,
        state: Mapping[str, Any] | None,
        environ: Mapping[str, str],
    ) -> None:
        self.jsonl = JsonlTracker(metrics_file)
        mode = choose_mode(config.wandb.mode, environ)
        # The other ranks wait meanwhile, for no longer than runtime.timeout_seconds.
        timeout = config.runtime.timeout_seconds
        self.wandb = WandbTracker(
            folder=metrics_file.parent,
            name=config.run.name,
            project=config.wandb.project,
            mode=mode,
            config=asdict(config),
            last_step=self.jsonl.last_step,
            patience_seconds=min(_SERVER_SECONDS, 0.4 * timeout) if mode == "online" else 0.8 * timeout,
        )
        last_step = self.jsonl.last_step
        self.jsonl.load_state_dict(_metrics_state(state) if state else {"bytes": 0})
        self.tensorboard = TensorBoardTracker(
            folder=metrics_file.parent, enabled=config.log.tensorboard, start_step=start_step
        )
        self.mlflow = MlflowTracker(
            folder=metrics_file.parent,
            name=config.run.name,
            project=environ.get("MLFLOW_EXPERIMENT_NAME") or config.wandb.project,
            enabled=config.log.mlflow,
            config=asdict(config),
            last_step=last_step,
            patience_seconds=min(_SERVER_SECONDS, 0.4 * timeout),
        )
        self.curves = CurvesTracker(metrics_file=metrics_file, enabled=config.log.curves)
        self.console = ConsoleTracker(
            terminal(),
            total_steps=total_steps,
            num_epochs=config.train.epochs,
            start_step=start_step,
            best_value=best_value,
            selection=selection,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where metrics.jsonl ends.

        Raises:
            OSError: the disk does not have every line that was appended to it.
        """
        return {"metrics": self.jsonl.state_dict()}

    def track(self, record: Mapping[str, Any]) -> None:
        """Write a line of metrics everywhere; what fails there does not end training."""
        self.jsonl.log(record)
        self.wandb.log(record)
        self.tensorboard.log(record)
        self.mlflow.log(record)
        self.curves.log(record)
        self.console.log(record)

    def end_training(self) -> None:
        """No line comes any more; the summary may.

        Raises:
            OSError: the disk does not have every line that was appended to metrics.jsonl.
        """
        self.console.close()
        self.jsonl.close()

    def track_summary(self, summary: Mapping[str, Any]) -> None:
        """Write what the finished run has reached."""
        self.wandb.log_summary(summary)
        self.mlflow.log_summary(summary)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError):  # only after a failure there is anything left to end, and that has its own message
            self.end_training()
        self.tensorboard.close()
        self.mlflow.close(failed=kind is not None)
        self.wandb.close(failed=kind is not None)


class NullTrackers:
    """The same on the other ranks: nothing is written there."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def track(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def end_training(self) -> None:
        """Do nothing."""

    def track_summary(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


def _metrics_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where metrics.jsonl ended; format 1 has it under another name."""
    found: Mapping[str, Any] = state["metrics"] if "metrics" in state else state["journal"]
    return found
