"""Slows or breaks training from outside, so that job scripts are tested as they are.

Python imports this file by itself when the folder is on PYTHONPATH. `DIST_TRAIN_TEST_PACE` is JSON (`Pace` in
`tests/pace.py` says what its fields mean).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

STEP = "dist_train.training.step"


class Pacer(MetaPathFinder):
    """Replaces the step as soon as it has been imported."""

    def __init__(self, pace: dict[str, Any]) -> None:
        self.pace = pace

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != STEP:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec
        assert spec.loader
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            print("importing", file=sys.stderr, flush=True)
            time.sleep(self.pace["import_seconds"])
            execute(module)
            self._pace_step(module.EagerStep)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _pace_step(self, kind: Any) -> None:
        take_step, pace = kind.__call__, self.pace
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")

        def step(self: Any, batches: Any, number: int, *, wants_stop: bool) -> Any:
            if number >= pace["slow_from"]:
                time.sleep(pace["step_seconds"])
            if number == pace["crash_at"] and rank == "0":
                raise RuntimeError(f"a fault in step {number}")
            return take_step(self, batches, number, wants_stop=wants_stop)

        kind.__call__ = step


pace = json.loads(os.environ.get("DIST_TRAIN_TEST_PACE", "null"))
if pace and int(os.environ.get("SLURM_RESTART_COUNT", "0")) < pace["attempts"]:
    sys.meta_path.insert(0, Pacer(pace))
