"""The names that other programs rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dist_train
from tests.commands import environment
from tests.patience import PATIENCE_SECONDS

NAMES = [
    "Classifier",
    "FeatureSpec",
    "JobConfig",
    "TabularInputs",
    "TrainingFault",
    "UserError",
    "load",
    "load_config",
    "register_loss",
    "register_metric",
    "register_model",
    "register_task",
    "train",
]
IMPORTS = """
import sys
import dist_train
slow = ("torch", "sklearn", "numpy", "polars", "omegaconf", "numba")
print([name for name in slow if name in sys.modules])
dist_train.load_config()
print(sorted(set(dist_train.__all__) - set(dir(dist_train))))
"""


def test_the_public_names_are_these() -> None:
    assert dist_train.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert (getattr(dist_train, name).__doc__ or "").strip()


def test_there_is_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dist_train.trian  # noqa: B018


def test_the_import_loads_no_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.stdout == "[]\n[]\n", done.stderr


def test_a_mistake_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"optim\.lr"):
        dist_train.load_config(overrides=["optim.lr=-1"])
