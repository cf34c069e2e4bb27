"""Time in which this process ran: what passes while it is suspended is nobody's fault.

Ctrl-Z, `scontrol suspend`, gang scheduling and a frozen virtual machine stop all processes of a job and continue them
later; the clocks go on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class RunningTime:
    """Notices pauses by looking at the clock in a thread, at least every `every_seconds` while the process runs.

    A look that is late by more than `late_seconds` comes after a pause. A busy host, or native code that keeps the
    interpreter from running, can make a thread late as well: what is measured then is too short, and never too long.
    """

    def __init__(
        self, every_seconds: float, late_seconds: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every_seconds = every_seconds
        self._late_seconds = late_seconds
        self._clock = clock
        self._looked = clock()
        self._pauses: list[tuple[float, float]] = []

    def look(self) -> float:
        """Seconds of the pause that has just ended, 0: there was none."""
        before, self._looked = self._looked, self._clock()
        if self._looked - before <= self._every_seconds + self._late_seconds:
            return 0.0
        self._pauses.append((before + self._every_seconds, self._looked))
        return self._looked - before - self._every_seconds

    def of_the_last(self, seconds: float) -> float:
        """How many of the last `seconds` were no pause."""
        start = self._clock() - seconds
        return seconds - sum(max(0.0, end - max(begin, start)) for begin, end in self._pauses)
