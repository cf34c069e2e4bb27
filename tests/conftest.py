"""For all tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# As torchrun gives its ranks: a sum over two threads rounds in another order, and threads of several tests fight.
torch.set_num_threads(1)

# Tests in each of these share what takes long to set up.
SHARING = ("tests/slurm/", "tests/hosts/", "tests/cli/test_train.py", "tests/cli/test_verify.py")


class Scheduling(LoadScopeScheduling):
    """Each test goes to whichever pytest worker is free; those of an entry of SHARING go to one together, and first."""

    def _split_scope(self, nodeid: str) -> str:
        return next((part for part in SHARING if nodeid.startswith(part)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Any:
    # Not xdist's own groups: pytest-xdist 3.8 forgets them under pytest 9.2.
    return Scheduling(config, log)
