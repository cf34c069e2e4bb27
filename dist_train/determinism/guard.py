"""Notices a step that draws from a global random generator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from dist_train.errors import UserError

_THOROUGH_CHECKS = 3


class GeneratorGuard:
    """Watches the global generators of torch (CPU and `device`), numpy and Python.

    What draws from them is not restored on resume, and depends on the number of ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
        self._torch = torch.get_rng_state()
        self._others = self._state_of_others()
        self._checks = 0

    def check(self, step: int) -> None:
        """Compare with the state when the guard was made, or last checked. Called after each step, counted from 1.

        torch's generators are compared after each step. To read the others takes 0.1 ms, so they are compared after
        the first steps and then after each 100th.

        Raises:
            UserError: a generator has moved; it says which one, and after which step that was seen.
        """
        self._checks += 1
        quick = self._checks > _THOROUGH_CHECKS and step % 100 and self._cuda is None
        if quick and torch.equal(torch.get_rng_state(), self._torch):
            return
        state, others = torch.get_rng_state(), self._state_of_others()
        moved = [] if torch.equal(state, self._torch) else ["torch's global CPU generator"]
        names = ("Python's random", "numpy's global generator", "torch's global CUDA generator")
        moved += [name for name, now, was in zip(names, others, self._others, strict=True) if now != was]
        self._torch, self._others = state, others
        if moved:
            raise UserError(
                f"a step up to step {step} has drawn from {' and '.join(moved)}: such numbers are not restored on "
                "resume and depend on the number of ranks. Use nn.Dropout modules, which are made keyed, instead of "
                "F.dropout, and determinism/keyed_random.py for anything else"
            )

    def _state_of_others(self) -> tuple[object, ...]:
        numpy_state: Any = np.random.get_state(legacy=False)
        # On CUDA the offset counts what was drawn; reading the whole state would wait for the device.
        cuda = (self._cuda.initial_seed(), self._cuda.get_offset()) if self._cuda else None
        return random.getstate(), (numpy_state["state"]["key"].tobytes(), numpy_state["state"]["pos"]), cuda
