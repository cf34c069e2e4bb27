"""torch's own timeout does not end ranks that a pause has kept waiting."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_train.distributed import world as worlds
from dist_train.distributed.world import World, process_group
from tests.ranks import in_processes


def _waits_longer_than_the_timeout(rank: int, rendezvous: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "TIMEOUT_GRACE_SECONDS", 0.0)
        place = World(rank=rank, size=2, local_rank=rank, local_size=2, rendezvous=rendezvous)
        with process_group(place, 4.0):
            dist.barrier()
            time.sleep(5.5 * rank)  # rank 0 waits in gloo meanwhile
            total = torch.ones(1)
            dist.all_reduce(total)
            return total.item()


def test_gloo_waits_for_as_long_as_the_watchdog_lets_it(tmp_path: Path) -> None:
    assert in_processes(2, _waits_longer_than_the_timeout, f"file://{tmp_path / 'store'}") == [2.0, 2.0]
