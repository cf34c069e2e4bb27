"""Asking a run to stop: a signal handler sets a flag, the loop reads it at the step boundary."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_PR_SET_PDEATHSIG = 1


def stop_when_parent_dies() -> None:
    """Ask the kernel for a SIGTERM when the launcher dies: without it, ranks would train on as orphans. Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


class StopFlag:
    """Raised by a signal, read by the loop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def raised(self) -> bool:
        """Whether somebody asked this process to stop."""
        return self.signal is not None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            # A second Ctrl-C: the user does not want to wait for the checkpoint.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.signal = signal.Signals(number)

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the stop signals inside the block; put back the former handlers after it."""
        former = {s: signal.signal(s, self._handle) for s in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
