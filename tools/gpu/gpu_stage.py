"""What the stories are played on: the project's commands, as a user types them, in a folder and on a device."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = "configs/credit_risk.yaml"
SECONDS_OF_A_COMMAND = 150.0
# What two runs of the same job need not agree in.
CLOCK = {"samples_per_second", "train_seconds"}


class Broken(Exception):
    """What a story was to show does not hold."""


def hold(true: bool, otherwise: str) -> None:
    """Raise Broken unless it is true."""
    if not true:
        raise Broken(otherwise)


def same(first: dict[str, Any], second: dict[str, Any], what: str) -> None:
    """Hold that two summaries are of the same weights and metrics."""
    hold(first["weights_sha256"] == second["weights_sha256"], f"{what}: other weights")
    hold(first["test"] == second["test"] and first["valid"] == second["valid"], f"{what}: same weights, other metrics")


class Stage:
    """Commands that share a folder and a device. `warnings` are lines that they wrote to stderr."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.device = device
        self.warnings: list[str] = []
        self._where = [f"runtime.device={device}", f"run.dir={folder}", "wandb.mode=disabled"]

    def job(self, name: str) -> list[str]:
        """The default job under a name."""
        return [CONFIG, f"run.name={name}", *self._where]

    def run(self, script: str, *arguments: object, ranks: int = 1, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command that ends with `code`."""
        done = subprocess.run(
            _line(script, *arguments, ranks=ranks), env=_environ(), capture_output=True, text=True,
            timeout=SECONDS_OF_A_COMMAND,
        )  # fmt: skip
        self.warnings += [
            line.strip() for line in done.stderr.splitlines() if "Warning" in line or "as a CUDA graph" in line
        ]
        hold(done.returncode == code, f"{script} {arguments} ended with {done.returncode}: {done.stderr[-1500:]}")
        return done

    def train(self, name: str, *arguments: str, ranks: int = 1) -> dict[str, Any]:
        """Train to the end; the summary."""
        self.run("train", *self.job(name), *arguments, ranks=ranks)
        summary: dict[str, Any] = json.loads((self.folder / name / "summary.json").read_text())
        return summary

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The metrics of a run, without those of the clock."""
        return [{k: v for k, v in record.items() if k not in CLOCK} for record in self._records(name)]

    def rate_of_last_lines(self, name: str) -> float:
        """Rows per second in the second half of a run: the median of its lines."""
        rates = [record["samples_per_second"] for record in self._records(name) if record.get("samples_per_second")]
        return float(statistics.median(rates[len(rates) // 2 :]))

    def last_checkpoint(self, name: str) -> int:
        """The step of the newest checkpoint of a run."""
        folders = (self.folder / name / "checkpoints").glob("step_*")
        return max(int(found.name.removeprefix("step_")) for found in folders if found.name[5:].isdigit())

    def _records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def killed(self, name: str, *arguments: str, at: int, how: int, ranks: int = 1) -> None:
        """Start a run and send it a signal as soon as the checkpoint of step `at` is there."""
        command = _line("train", *self.job(name), *arguments, ranks=ranks)
        with subprocess.Popen(command, env=_environ(), stderr=subprocess.DEVNULL, start_new_session=True) as process:
            wanted, deadline = self.folder / name / "checkpoints" / f"step_{at:08d}", time.monotonic() + 120
            while not wanted.is_dir():
                hold(process.poll() is None, f"{name} ended before its checkpoint of step {at}")
                hold(time.monotonic() < deadline, f"{name}: no checkpoint of step {at}")
                time.sleep(0.002)
            if how == signal.SIGKILL:
                os.killpg(process.pid, how)
            else:
                process.send_signal(how)
            process.wait(60)
        over = (self.folder / name / "summary.json").is_file()
        hold(not over, f"{name} was over before the signal came: try an earlier step")


def _line(script: str, *arguments: object, ranks: int) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*start, f"launch/{script}.py", *map(str, arguments)]


def _environ() -> dict[str, str]:
    """One thread, as torchrun gives its ranks: on a CPU the number of threads is part of the bits."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1"}
