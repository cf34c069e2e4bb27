"""`launch/train.py` with a trap laid, a fault or a pause after each step: `driver.py '{"save": 3}' ARGUMENTS`.

The trap kills the launcher and all of its ranks, as a node that dies would do it. `fault` holds the fields of a
`Fault`; `mark` is the file that it writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dist_train.__main__ import run
from dist_train.training.step import EagerStep
from tests.resume import faults, jobs
from tests.resume.processes import children


def _die_with_everybody() -> None:
    launcher = os.getppid()
    for rank in children(launcher):
        if rank != os.getpid():
            os.kill(rank, signal.SIGKILL)
    os.kill(launcher, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _pause_after_steps(seconds: float) -> None:
    take_step = EagerStep.__call__

    def step(self: EagerStep, batches: Any, number: int, *, wants_stop: bool) -> Any:
        time.sleep(seconds)
        return take_step(self, batches, number, wants_stop=wants_stop)

    EagerStep.__call__ = step  # type: ignore[method-assign]


if __name__ == "__main__":
    trap = json.loads(sys.argv.pop(1))
    _pause_after_steps(trap.pop("pause", 0))
    rank = int(os.environ.get("RANK", "0"))
    fault, mark = faults.Fault(*trap.pop("fault", ("raise", -1, ""))), Path(trap.pop("mark", ""))
    if fault.rank == rank:
        faults.lay(fault, mark)
    if trap and rank == 0:
        jobs.die = _die_with_everybody
        jobs.lay(jobs.Trap(**trap))
    run("train", "launch/train.py", sys.argv[1:])
