"""The lock of a run folder: one job at a time writes there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.slurm import Attempt
from dist_train.errors import TrainingFault, UserError, os_errors_as_faults
from dist_train.system.console import log

_TURN_SECONDS = 1.0
_HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class RunLock:
    """Locks a run folder against a second job until this process ends.

    The lock is the kernel's (flock): it ends with its process. The file names the holder, or the last one. `take` waits
    `patience_seconds` for another job, which may be in its last save, and `own_patience_seconds` for an earlier attempt
    of the same job, which may still wait for ranks on a lost host.

    A network file system can lose a lock and give it to another host, and some have no locks. So the name in the file
    counts as well: the job that wrote it last holds the folder, and `confirm` fails in the others.
    """

    def __init__(
        self,
        file: Path,
        holder: Mapping[str, Any],
        patience_seconds: float = 5.0,
        own_patience_seconds: float = 5.0,
        what: str = "run folder",
    ) -> None:
        self._file = file
        self._what = what
        self._holder = dict(holder)
        self._patience_seconds = patience_seconds
        self._own_patience_seconds = own_patience_seconds
        self._waiting_since: float | None = None
        self._announced_waiting = False
        self._stream: IO[bytes] | None = None
        self.former: Mapping[str, Any] = {}
        """The holder before this process; empty when there was none."""

    def take(self, at_most_seconds: float = float("inf")) -> bool:
        """Whether this process has the lock, after waiting for at most `at_most_seconds`.

        Raises:
            UserError: another job has held it for longer than this one waits.
        """
        called = time.monotonic()
        self._waiting_since = self._waiting_since or called
        while not self._try():
            now = time.monotonic()
            self._refuse_after_patience(now - self._waiting_since)
            if now - called >= at_most_seconds:
                return False
            time.sleep(0.1)
        return True

    def take_on_rank_zero(self, collectives: Collectives, what: str) -> None:
        """Rank 0 takes the lock while the other ranks wait; called by all of them. `what` names the folder in a fault.

        Raises:
            UserError: another job has held it for longer than this one waits.
            Stopped: the ranks have agreed to stop meanwhile.
        """
        # In short turns: the other ranks' collective must not run out of time while rank 0 waits.
        while not collectives.on_rank_zero(lambda: os_errors_as_faults(lambda: self.take(_TURN_SECONDS), what)):
            collectives.raise_if_stop_agreed()

    def confirm(self) -> None:
        """Check that this process still holds the folder.

        Raises:
            TrainingFault: the folder was removed or replaced, or another job has taken it over.
        """
        lost = self._lost()
        if lost:
            raise TrainingFault(f"{self._file.parent}: {lost}; nothing more is saved in it")

    def release(self) -> None:
        """Unlock the folder. A second call does nothing."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> RunLock:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _try(self) -> bool:
        try:
            stream = self._file.open("a+b")
        except FileNotFoundError:  # the holder is moving the folder aside, and makes a new one
            return False
        # The holder may have moved the folder aside since the file was opened.
        if not (self._flock(stream) and self._is_in_place(stream)):
            stream.close()
            return False
        self.former = self._who()
        stream.truncate(0)
        stream.write(json.dumps(self._holder).encode())
        stream.flush()
        os.fsync(stream.fileno())  # for other hosts
        self._stream = stream
        return True

    def _lost(self) -> str | None:
        """Why the folder is no longer ours; None while it is."""
        assert self._stream is not None, "asked before the lock was taken"
        try:
            if not self._is_in_place(self._stream):
                if not os.path.exists(self._file.parent):  # noqa: PTH110 (pathlib's raises on a stale handle)
                    return "the run folder is gone: removed, or its disk was unmounted"
                return "the run folder was replaced by another one, or its lock file was removed"
            # Locking again does nothing while the lock is held.
            if not self._flock(self._stream) or self._who() != self._holder:
                return f"another job has taken the run folder over: {self._described()}"
        except OSError as error:
            return f"the run folder cannot be reached: {error.strerror}"
        return None

    def _flock(self, stream: IO[bytes]) -> bool:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                return False
            if error.errno not in _NO_LOCKS_HERE:
                raise
            if self._stream is None:  # not again at each save
                log.warning(
                    "%s: this file system has no locks (%s): a second job in this run folder is not refused, it takes "
                    "the folder over, and the first one ends at its next checkpoint",
                    self._file.parent, error.strerror,
                )  # fmt: skip
        return True

    def _is_in_place(self, stream: IO[bytes]) -> bool:
        """Whether an open file is still the one in the folder."""
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self._file.stat())
        except OSError as error:
            if error.errno not in _GONE:
                raise
        return False

    def _refuse_after_patience(self, waited_seconds: float) -> None:
        own = self._held_by_earlier_attempt()
        patience_seconds = self._own_patience_seconds if own else self._patience_seconds
        if waited_seconds >= patience_seconds:
            advice = f". It is an earlier attempt of this job: if its host is lost for good, remove {self._file}"
            raise UserError(
                f"{self._file.parent}: another job is using this {self._what}: {self._described()}"
                f"{advice if own else ''}"
            )
        if own and not self._announced_waiting:
            self._announced_waiting = True
            log.info(
                "waiting up to %.0f s until an earlier attempt of this job has left the run folder: %s",
                patience_seconds, self._described(),
            )  # fmt: skip

    def _held_by_earlier_attempt(self) -> bool:
        job, restart = (self._who().get(key) for key in ("job", "restart"))
        return job is not None and job == self._holder.get("job") and restart in range(self._holder["restart"])

    def _who(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _described(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self._who().items()) or "it has not said who it is"


def this_process(environ: Mapping[str, str]) -> dict[str, Any]:
    """This process as a lock's holder: host, process, since when, and the scheduler's job and attempt if any."""
    holder: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid()}
    attempt = Attempt.from_environment(environ)
    if attempt:
        holder |= {"job": attempt.job, "restart": attempt.restart}
    if "SLURM_ARRAY_JOB_ID" in environ:  # the name under which squeue lists an element of a job array
        holder["array"] = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return holder | {"since": datetime.now().astimezone().isoformat(timespec="seconds")}
