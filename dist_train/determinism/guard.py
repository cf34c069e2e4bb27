"""Notices a step that draws from a global random generator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dist_train.errors import UserError

_THOROUGH_STEPS = 3
_STEPS_BETWEEN_THOROUGH = 100
_NUMPY, _PYTHON = "numpy's global generator", "Python's random"
_SHARED_WITH_THREADS = {_NUMPY, _PYTHON}


class GeneratorGuard:
    """Compares the global generators of torch (CPU and `device`), numpy and Python before and after a step.

    What a step draws from them is not restored on resume, and depends on the number of ranks. Between steps they may
    be used. torch's are compared at each step; numpy's and Python's, which take 0.1 ms to read, at the first steps that
    the guard sees and then at each 100th. A thread of a library may draw from these two, so a step is refused for them
    only when they have moved in the step before it as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
        self._seen = 0
        self._suspects: set[str] = set()
        """Generators that have moved in the step before."""

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Watch a step, counted from 1.

        Raises:
            UserError: a generator has moved inside the block; it says which one.
        """
        self._seen += 1
        thorough = bool(self._suspects) or self._seen <= _THOROUGH_STEPS or step % _STEPS_BETWEEN_THOROUGH == 0
        before = self._state(thorough=thorough)
        yield
        after = self._state(thorough=thorough)
        moved = [name for name, state in after.items() if not _same(state, before[name])]
        certain = [name for name in moved if name not in _SHARED_WITH_THREADS or name in self._suspects]
        self._suspects = set(moved)
        if certain:
            raise UserError(
                f"step {step} has drawn from {' and '.join(certain)}: such numbers are not restored on resume and "
                "depend on the number of ranks. Use nn.Dropout modules, which are made keyed, instead of F.dropout, "
                "and determinism/keyed_random.py for anything else"
            )

    def _state(self, *, thorough: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"torch's global CPU generator": torch.get_rng_state()}
        if self._cuda:
            # The offset counts what was drawn; reading the whole state would wait for the device.
            state["torch's global CUDA generator"] = (self._cuda.initial_seed(), self._cuda.get_offset())
        if thorough:
            of_numpy: Any = np.random.get_state(legacy=False)
            state[_NUMPY] = (of_numpy["state"]["key"].tobytes(), of_numpy["state"]["pos"])
            state[_PYTHON] = random.getstate()
        return state


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
