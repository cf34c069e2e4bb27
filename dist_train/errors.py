"""The ways in which a run ends early with a message of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

EXIT_USER_ERROR = 2
EXIT_FAULT = 1
EXIT_INTERRUPTED = 130  # as shells count: 128 + SIGINT


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do.

    A command ends with exit code 2 and no traceback. It is a ValueError, which callers of scikit-learn expect.
    """


class TrainingFault(Exception):
    """Training cannot go on (a loss that is not finite, say): one message, exit code 1, no traceback."""


class PeerFailed(TrainingFault):
    """Another rank has failed, and says by what itself."""


class LauncherDied(TrainingFault):
    """The run was saved and ended because torchrun is gone."""


class Stopped(Exception):
    """All ranks have agreed to stop at this place because one of them was asked to; nothing has gone wrong."""


def os_errors_as_faults(write: Callable[[], T], what: str) -> T:
    """Run `write`; a failing disk becomes a TrainingFault of one line. What was committed before is untouched."""
    try:
        return write()
    except OSError as error:
        raise TrainingFault(f"{what} could not be written: {error}; what was saved before is intact") from None
