"""Something to happen before each collective. In a file of this name, since a report gives the place of a collective
as the nearest one in the code that is not in a module `collectives`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_train.distributed.collectives import Collectives


def before_each(name: str, act: Callable[[Collectives], object]) -> None:
    """Call `act` before each call of a method of Collectives, from now on and in this process."""
    method = getattr(Collectives, name)

    def wrapped(self: Collectives, *arguments: Any) -> Any:
        act(self)
        return method(self, *arguments)

    setattr(Collectives, name, wrapped)
