"""The ways in which a run ends early with a message of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

EXIT_USER_ERROR = 2
EXIT_FAULT = 1
EXIT_INTERRUPTED = 130  # as shells count: 128 + SIGINT


def printable(text: str) -> str:
    """The text with escapes for all that a terminal does not show as it is: line breaks, colours, marks of direction.

    A name in a file may hold any of these. Escapes are not escaped again.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong, where, and what to do. It is one line.

    A command ends with exit code 2 and no traceback. It is a ValueError, which callers of scikit-learn expect.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class Mistakes(UserError):
    """All mistakes of a configuration: a line for each, and where there are several a line before them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = [printable(problem) for problem in problems]
        lines = self.problems
        if len(lines) > 1:
            lines = [f"{len(lines)} mistakes in the configuration:", *(f"  - {line}" for line in lines)]
        ValueError.__init__(self, "\n".join(lines))

    def __reduce__(self) -> tuple[type[Mistakes], tuple[list[str]]]:
        return Mistakes, (self.problems,)


class TrainingFault(Exception):
    """Training cannot go on (a loss that is not finite, say): one line, exit code 1, no traceback."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ComputationFault(TrainingFault):
    """A rank has computed wrongly, or its memory has changed; the message names it."""


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
