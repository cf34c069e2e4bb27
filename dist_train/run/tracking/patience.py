"""Calls that may hang: a server in silence must not hold up training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def in_time(call: Callable[[], Any], seconds: float, name: str) -> Any:
    """What a call returns. Raises TimeoutError where it takes longer; it is left to itself then, in a thread `name`."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome.result(seconds)
