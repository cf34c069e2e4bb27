"""How fast a training command goes, told from outside: job scripts and commands are tested as they are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.commands import REPOSITORY

INJECTED = Path(__file__).with_name("injected")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How the first `attempts` attempts of a job train.

    They sleep `import_seconds` while they import, and `step_seconds` in every step from `slow_from` on; rank 0 breaks
    in step `crash_at`.
    """

    attempts: int = 1
    import_seconds: float = 0.0
    slow_from: int = 20
    step_seconds: float = 0.0
    crash_at: int | None = None

    def environment(self) -> dict[str, str]:
        """Environment of a command that is to go at this pace. Every Python in it reads `tests/injected/`."""
        path = os.pathsep.join([str(INJECTED), str(REPOSITORY)])
        return {"PYTHONPATH": path, "DIST_TRAIN_TEST_PACE": json.dumps(asdict(self))}


AS_IT_COMES = Pace(attempts=0)
SLOW = Pace(step_seconds=2.0)
"""More than a minute in the middle of training; another attempt then has a second of work."""
