"""For all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

# As torchrun gives its ranks: a sum over two threads rounds in another order, and threads of several tests fight.
torch.set_num_threads(1)

ON_ONE_CLUSTER = Path(__file__).with_name("slurm")


@pytest.hookimpl(tryfirst=True)  # xdist looks at the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several pytest workers: the tests on Slurm share a cluster, so one worker has them, and begins with them."""
    on_cluster = [item for item in items if ON_ONE_CLUSTER in item.path.parents]
    for item in on_cluster:
        item.add_marker(pytest.mark.xdist_group("slurm"))
    items[:] = on_cluster + [item for item in items if item not in set(on_cluster)]
