"""How many steps a loop lets go before it is known how the one before them has ended."""

from __future__ import annotations

from typing import Any

import torch

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.session import STEPS_AHEAD, build_loop
from tests.dist.sessions import BUILTIN, build


class OnAGpu:
    """Collectives of a rank with a GPU, as far as a loop asks when it is built."""

    device = torch.device("cuda")


def test_a_replay_on_a_gpu_does_not_go_beyond_its_last_step() -> None:
    session, collectives = build(Collectives(World()), [*BUILTIN, "model.hidden_dim=8"]), OnAGpu()

    def steps_ahead(device: Any, *, put_off: bool) -> int:
        loop = build_loop(
            session.config, session, device,
            save=lambda _: None, track=lambda _: None, wants_stop=lambda: False, put_off=put_off,
        )  # fmt: skip
        return loop.intervals.steps_ahead

    assert steps_ahead(collectives, put_off=True) == STEPS_AHEAD
    assert steps_ahead(collectives, put_off=False) == 0
    assert steps_ahead(Collectives(World()), put_off=True) == 0
