"""How long tests wait: bounds that end what hangs, on a machine that is busy with more, and say nothing of speed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_SECONDS = float(os.environ.get("DIST_TRAIN_TEST_PATIENCE", "300"))

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T],
    what: str,
    seen: Callable[[], object] = str,
    *,
    seconds: float = PATIENCE_SECONDS,
    pause: float = 0.01,
) -> T:
    """What `condition` returns once that is true. A failure tells `what` was waited for and what `seen` returns."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {seen()}"
        time.sleep(pause)
    return value
