"""Asking a run to stop. Nothing is saved here: a request is noted, and the ranks agree on it where they can stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dist_train.distributed.slurm import Attempt

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""SIGHUP: the terminal was closed, or its connection lost."""
LAUNCHER_DIED = "its launcher died"

_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LOOKS = 1.0


class Launcher:
    """The process that started this one and looks after it, as torchrun does for its ranks."""

    def __init__(self) -> None:
        self._process = os.getppid()

    @property
    def died(self) -> bool:
        """Whether it is gone; its children then belong to another process."""
        return os.getppid() != self._process

    def wake_when_it_dies(self) -> None:
        """Ask the kernel for a SIGTERM when it dies, so that a rank does not train on as an orphan. Linux only."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if self.died:  # before the kernel knew
                os.kill(os.getpid(), signal.SIGTERM)


class StopRequest:
    """Whether this process was asked to stop: by a signal, a stop file, its time limit, or the death of its launcher.

    `file` is looked for once a second; None on ranks that need not look. A file that names `attempt` asks this process;
    one that names another attempt of a job is stale. An empty file asks the job that holds the run folder: this one
    once `holds_folder` says so. `cause` says what asked, None: nothing has yet.
    """

    def __init__(
        self,
        *,
        file: Path | None = None,
        attempt: Attempt | None = None,
        holds_folder: Callable[[], bool] = lambda: True,
        time_limit_seconds: float | None = None,
        launcher: Launcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cause: str | None = None
        self.launcher = launcher
        self._file = file
        self._attempt = attempt
        self._holds_folder = holds_folder
        self._held = False
        self._clock = clock
        self._deadline = None if time_limit_seconds is None else clock() + time_limit_seconds
        self._next_look = clock()

    def wanted(self) -> bool:
        """Whether somebody asked. Cheap enough for every step."""
        if self.launcher and self.launcher.died:
            self.cause = LAUNCHER_DIED  # the signal that came with it says less
        elif self.cause is None:
            self.cause = self._asked_without_signal()
        return self.cause is not None

    def _asked_without_signal(self) -> str | None:
        now = self._clock()
        if self._deadline is not None and now >= self._deadline:
            return "run.time_limit_minutes is over"
        holds = self._holds_folder()
        if self._file is not None and (now >= self._next_look or holds != self._held):
            self._next_look, self._held = now + _SECONDS_BETWEEN_LOOKS, holds
            if self._file_asks(self._file):
                return f"stop file {self._file}"
        return None

    def _file_asks(self, file: Path) -> bool:
        try:
            # On NFS a client may go on believing for a minute that a file is not there; to open its folder ends that.
            os.close(os.open(file.parent, os.O_RDONLY))
            asked = file.read_text().strip()
        except OSError:
            return False
        return self._held if asked == "" else asked == str(self._attempt)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.cause == name:
            # A second Ctrl-C: the user does not want to wait for the checkpoint.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.cause = name

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the stop signals inside the block; put back the former handlers after it.

        Python lets only the main thread handle signals: elsewhere none are handled.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # nohup has SIGHUP ignored: training goes on.
        handled = [s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        former = {s: signal.signal(s, self._handle) for s in handled}
        try:
            if self.launcher:
                self.launcher.wake_when_it_dies()
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
