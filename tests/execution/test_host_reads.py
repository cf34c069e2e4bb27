"""On a GPU nothing in a step may read a number of the device: a recorded step cannot, and an eager one would wait.

The steps are taken on the meta device, whose tensors have no numbers: whatever reads one raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.determinism.batch_norm import GatheredBatchNorm1d
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution import exact
from dist_train.tasks import classification
from tests.dist.sessions import BUILTIN, build

META = torch.device("meta")


class Kernels(TorchDispatchMode):
    """Stands in for the kernels that the meta device has not."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_fused_adamw_":
            return None
        if name == "batch_norm_update_stats":
            features = args[0].shape[1]
            return args[0].new_empty(features), args[0].new_empty(features)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["train.class_weights=balanced", "train.label_smoothing=0.1", "model.embedding_dim=4"],
        ["train.ema_decay=0.9"],
        ["train.ema_decay=0.9", "train.ema_warmup=false", "train.precision=float64"],
        ["train.virtual_ranks=1"],
        ["train.virtual_ranks=8", "train.ema_decay=0.9"],
        ["optim.max_grad_norm=null"],
    ],
    ids=" ".join,
)
def test_a_step_reads_no_number_of_the_device(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # They look at numbers, once, when a model or a loss is prepared.
    monkeypatch.setattr(exact, "check_row_wise", lambda *_: None)
    monkeypatch.setattr(exact, "check_own_operations", lambda *_: None)
    monkeypatch.setattr(classification, "balanced_weights", lambda *_: torch.ones(3, dtype=torch.float64, device=META))
    session = build(Collectives(World(device=META)), [*BUILTIN, *more])
    normalised = [m for m in session.model.modules() if isinstance(m, GatheredBatchNorm1d)]
    assert normalised, "BatchNorm is that of several ranks"
    for number, (batches, _) in enumerate(session.feed.steps(session.progress.position)):
        with Kernels():
            result = session.step(batches, number, wants_stop=False)
        assert isinstance(result.finite, torch.Tensor)
        assert result.totals.device == META
        if number == 1:
            break


def test_the_stand_in_notices_a_read() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(1, device=META).item()


def test_without_a_batch_the_rows_are_counted_on_the_device() -> None:
    layer = GatheredBatchNorm1d.from_plain(torch.nn.BatchNorm1d(3), Collectives(World()))
    assert layer.rows_of_batch(torch.full((3,), 5.0)) == 5.0
    with pytest.raises(ValueError, match="at least two rows"):
        layer.rows_of_batch(torch.ones(3))
