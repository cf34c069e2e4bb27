"""MLflow. Training never depends on it: any failure here is one warning, and so is a server in silence."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.run.tracking.patience import in_time
from dist_train.system.console import log
from dist_train.system.files import write_atomically

_PARAMS_AT_ONCE = 100
_LONGEST_PARAM = 500


class MlflowTracker:
    """One MLflow run for one run folder, also after a resume, where MLFLOW_TRACKING_URI says. No step is sent twice.

    `mlflow.json` in the run folder keeps the id of the MLflow run and the last step that was sent. `last_step` is the
    last step in metrics.jsonl before a resume cuts it. A call that takes longer than `patience_seconds` is the last
    one: the other ranks wait meanwhile.
    """

    def __init__(
        self,
        *,
        folder: Path,
        name: str,
        project: str,
        enabled: bool,
        config: Mapping[str, Any],
        last_step: int,
        patience_seconds: float = 30.0,
    ) -> None:
        self._client: Any = None
        self._run_id, self._sent_step = "", 0
        self._patience_seconds = patience_seconds
        if not enabled:
            return
        try:
            file = folder / "mlflow.json"
            in_time(lambda: self._open(file, name, project, config, last_step), patience_seconds, "mlflow")
        except ImportError:
            log.warning('mlflow is not installed: log.mlflow has no effect: pip install "dist_train[mlflow]"')
        except Exception as error:
            self._give_up(error)

    def _open(self, file: Path, name: str, project: str, config: Mapping[str, Any], last_step: int) -> None:
        from mlflow.tracking import MlflowClient  # here: it takes seconds

        client = MlflowClient()
        if file.exists():
            known = json.loads(file.read_bytes())
            self._sent_step = max(known["sent_step"], last_step)
            client.update_run(known["run_id"], status="RUNNING")
            self._run_id = known["run_id"]
        else:
            experiment = client.get_experiment_by_name(project)
            place = client.create_experiment(project) if experiment is None else experiment.experiment_id
            self._run_id = client.create_run(place, run_name=name).info.run_id
            self._send_params(client, config)
        write_atomically(file, json.dumps({"run_id": self._run_id, "sent_step": self._sent_step}).encode())
        self._client = client

    def _send_params(self, client: Any, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in _flat(config)]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            client.log_batch(self._run_id, params=params[start : start + _PARAMS_AT_ONCE])

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a line of metrics under `<split>/<name>`."""
        if record["step"] > self._sent_step:
            self._send({f"{record['split']}/{name}": value for name, value in _numbers(record)}, record["step"])

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Send the metrics of the best weights on the test rows, and the hash of these."""
        client, run_id = self._client, self._run_id
        if client is None:
            return
        self._send({f"test/{name}": value for name, value in _numbers(summary.get("test") or {})}, summary["steps"])
        digest = str(summary.get("weights_sha256"))
        self._call(lambda: client.set_tag(run_id, "weights_sha256", digest))

    def close(self, *, failed: bool = False) -> None:
        """End the run; a second call does nothing."""
        client, run_id = self._client, self._run_id
        if client is not None:
            self._call(lambda: client.set_terminated(run_id, "FAILED" if failed else "FINISHED"))
        self._client = None

    def _send(self, values: Mapping[str, float], step: int) -> None:
        client, run_id = self._client, self._run_id
        if client is None:
            return

        def send() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            client.log_batch(run_id, metrics=[Metric(name, float(value), now, step) for name, value in values.items()])

        self._call(send)

    def _call(self, call: Any) -> None:
        if self._client is None:
            return
        try:
            in_time(call, self._patience_seconds, "mlflow")
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._client = None
        log.warning("mlflow failed (%s): training goes on without it", type(error).__name__)


def _numbers(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in record.items() if name != "step" and type(value) in (int, float)]


def _flat(config: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Keys with their sections, `train.epochs`."""
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        inside = isinstance(value, Mapping) and value
        found += _flat(value, f"{before}{name}.") if inside else [(f"{before}{name}", value)]
    return found
