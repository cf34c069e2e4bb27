"""Runs of a sweep, in processes of their own, some at a time. What was interrupted is continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dist_train.config.run_path import path_of_run
from dist_train.config.schema import JobConfig
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.system.console import log


@dataclass(frozen=True)
class SweepRun:
    """One run: its configuration, and the arguments of `dist-train train` that give it."""

    config: JobConfig
    arguments: Sequence[str]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return path_of_run(self.config)


def train_all(runs: Sequence[SweepRun], at_once: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Train every run, `at_once` at a time; name of each that is not finished -> why.

    Several at a time share the cores, and write what they say to `<run folder>.log`. A signal (Ctrl-C, SIGTERM) is
    handed on to the runs, which save and stop; no other is begun then. A run that fails does not stop the others.
    """
    work = _Work(at_once, environ)
    with work.stopped_by_signals(), ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(work.train, runs))
    return {run.config.run.name: reason for run, reason in zip(runs, found, strict=True) if reason}


class _Work:
    def __init__(self, at_once: int, environ: Mapping[str, str]) -> None:
        self._at_once, self._environ = at_once, environ
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def train(self, run: SweepRun) -> str:
        """Why the run is not finished; empty: it is."""
        with self._lock:
            if self._stopping:
                return "not begun"
            log.info("run %s", run.config.run.name)
            process = self._started(run)
            self._processes.add(process)
        code = process.wait()
        with self._lock:
            self._processes.discard(process)
        if code:
            seen = f", see {self._log_of(run)}" if self._at_once > 1 else ""
            return f"ended with exit code {code}{seen}"
        return "" if RunFolder(run.folder).summary.is_file() else "stopped and saved"

    def _log_of(self, run: SweepRun) -> Path:
        return run.folder.with_name(f"{run.folder.name}.log")

    def _started(self, run: SweepRun) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dist_train", "train", *run.arguments]
        environ = dict(self._environ)
        # In a session of its own: a terminal's Ctrl-C reaches this process alone, which hands it on.
        if self._at_once == 1:
            return subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)
        cores = len(os.sched_getaffinity(0))
        environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // self._at_once)))
        self._log_of(run).parent.mkdir(parents=True, exist_ok=True)
        with self._log_of(run).open("ab") as said:
            return subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        def stop(_number: int, _frame: FrameType | None) -> None:
            self._stopping = True
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)

        former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
