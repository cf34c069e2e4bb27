"""The kernels of the default network on a GPU, against torch's modules and against themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import TrainingFault
from dist_train.execution.fused import FusedSteps
from dist_train.run.session import Session, build_loop
from dist_train.training.loop import Ending
from tests.dist.sessions import BUILTIN, build
from tests.gpu.graphs import all_tensors, assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda sees no GPU on this machine"),
]

LONG = ("train.epochs=9", "train.max_steps=170", "log.every_steps=20", "evaluation.every_steps=60")
EPOCH_STEPS = 71  # of the built-in table at a batch of 256; the last has 59 rows


def session_of(*more: str) -> Session:
    session = build(Collectives(World(device=torch.device("cuda", 0))), [*BUILTIN, *LONG, *more])
    assert isinstance(session.execution.deferred, FusedSteps)
    return session


def one_by_one(session: Session, steps: int, *, plain: bool = False) -> np.ndarray[Any, Any]:
    """Loss, weight and norm of each step."""
    eager: Any = session.step.inner  # type: ignore[attr-defined]
    if plain:
        eager.computation = eager.compute
    seen = []
    for batches, position in session.feed.steps(session.progress.position):
        result = session.step(batches, session.progress.step, wants_stop=False)
        session.progress.step, session.progress.position = session.progress.step + 1, position
        assert bool(result.finite)
        seen.append([*result.totals[:2].tolist(), float(result.grad_norm)])
        if len(seen) == steps:
            break
    return np.array(seen)


def run(session: Session, saved: dict[int, Any] | None = None) -> list[dict[str, Any]]:
    """The loop to its end, steps sent off together; its lines, without speeds."""
    lines: list[dict[str, Any]] = []

    def save(step: int) -> None:
        if saved is not None:
            parts = {part: {name: t.clone() for name, t in of.items()} for part, of in session.tensor_parts().items()}
            saved[step] = parts | {"state.json": {"progress": dict(session.progress.state_dict())}}

    collectives = Collectives(World(device=torch.device("cuda", 0)))
    loop = build_loop(session.config, session, collectives, save=save, track=lines.append, wants_stop=lambda: False)
    assert loop.run() is Ending.FINISHED
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


@pytest.mark.parametrize(
    ("more", "close"),
    [
        ((), 1e-5),
        (("train.virtual_ranks=4", "train.class_weights=balanced", "train.label_smoothing=0.1"), 1e-5),
        (("train.precision=bf16",), 2e-2),
    ],
    ids=str,
)
def test_losses_are_those_of_torchs_modules(more: tuple[str, ...], close: float) -> None:
    """Over the end of an epoch, whose last batch is a ragged one."""
    found, expected = one_by_one(session_of(*more), 75), one_by_one(session_of(*more), 75, plain=True)
    np.testing.assert_allclose(found[:20, :2], expected[:20, :2], rtol=close)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=100 * close)
    np.testing.assert_allclose(found[:20, 2], expected[:20, 2], rtol=100 * close)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("more", [("train.ema_decay=0.9",), ("train.virtual_ranks=4",)], ids=" ".join)
def test_steps_that_are_sent_off_together_are_the_single_ones_and_a_killed_run_goes_on(more: tuple[str, ...]) -> None:
    saved: dict[int, Any] = {}
    together, alone, again = (session_of(*more, "checkpoint.every_steps=60") for _ in range(3))
    expected = run(together, saved)
    one_by_one(alone, 170)
    assert_same(
        {n: t for n, t in all_tensors(alone).items() if not n.startswith("meter")},
        {n: t for n, t in all_tensors(together).items() if not n.startswith("meter")},
    )
    again.restore(saved[60])
    found = run(again)
    assert again.execution.settled
    assert_same(all_tensors(again), all_tensors(together))
    assert found == [line for line in expected if line["step"] > 60]
    for session in (together, alone, again):
        session.close()


def test_a_row_that_is_not_a_number_ends_the_run_at_its_step() -> None:
    session = session_of()
    rows: Any = session.task.splits["train"]
    rows.inputs[0][int(session.feed.sampler.order(0)[20 * 256 + 3])] = torch.nan
    with pytest.raises(TrainingFault, match=r"^step 21 \(epoch 1\): the loss is nan"):
        run(session)
