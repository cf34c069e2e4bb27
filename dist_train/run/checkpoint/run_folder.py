"""The folder of a run: its layout, and how a new run moves an older one aside."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from dist_train.config.load import read_config
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError
from dist_train.run.checkpoint.lock import RunLock


class RunFolder:
    """Paths of a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.witness = path / "witness.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.requeue = path / "requeue"
        self.lock = path / "lock"
        self.changes = path / "changes.jsonl"
        self.stop = path / "stop"
        self.fault = path / "fault.txt"
        self.held: RunLock | None = None
        """The lock, in the process that writes here."""

    def create(self) -> None:
        """Make the folder and check that it is writable.

        Raises:
            UserError: it is not.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"{self.path}: the run folder cannot be written: {os.strerror(error.errno or 0)}") from None

    def confirm(self) -> None:
        """Check that this process still holds the folder.

        Raises:
            TrainingFault: it was removed, replaced or taken over; nothing may be written there any more.
        """
        if self.held:
            self.held.confirm()

    def add_to_report(self, text: str) -> None:
        """Append to the fault report, where that is possible: the command says the same on stderr."""
        with suppress(OSError), self.fault.open("a") as stream:
            stream.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def move_aside(self) -> Path | None:
        """Rename an older run out of the way, to the first free `<name>.old-N`; None when there is nothing to move."""
        if not {*self.path.iterdir()} - {self.lock, self.stop, self.fault, self.requeue}:
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.replace(target)
        return target


def opened_run(path: Path) -> tuple[RunFolder, JobConfig]:
    """The folder of a run, and the configuration of its last start.

    Raises:
        UserError: `path` is not a run folder, or this version cannot read its configuration.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"{path}: is not a run folder (it has no config.yaml)")
    return folder, read_config(folder.config)
