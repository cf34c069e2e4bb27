"""Processes of this host, told apart from later ones of the same number."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["running", "stopped", "gone", "unknown"]


def host_name() -> str:
    """What reports call this host."""
    return socket.gethostname()


class Process(NamedTuple):
    """A process. `started` is when it began, in the kernel's own count; None: /proc does not say."""

    host: str
    number: int
    started: str | None

    @classmethod
    def of(cls, number: int) -> Process:
        """The process of this host that has a number now."""
        fields = _stat(number)
        return cls(host_name(), number, fields[19] if fields else None)

    def state(self) -> State:
        """What has become of it; only its own host can tell."""
        if self.started is None:
            return "unknown"
        fields = _stat(self.number)
        if fields is None or fields[19] != self.started or fields[0] in "ZX":
            return "gone"
        return "stopped" if fields[0] in "Tt" else "running"

    def open_file(self, handle: int, flags: int) -> int | None:
        """A file that it has open; None where /proc does not show it (containers, other users, other systems)."""
        try:
            return os.open(f"/proc/{self.number}/fd/{handle}", flags)
        except OSError:
            return None


def _stat(number: int) -> list[str] | None:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
