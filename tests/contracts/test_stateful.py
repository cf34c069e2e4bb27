"""One contract for everything that a checkpoint holds: saved, loaded into a fresh one, it goes on to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

from dist_train.determinism.batch_norm import sync_batch_norm
from dist_train.determinism.keyed_random import seeded
from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.execution.average import MovingAverage
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.execution.optimizer import AdamW
from dist_train.models.financial_classifier import FinancialClassifier
from dist_train.run.checkpoint.state import pack_json, pack_tensors, unpack_json, unpack_tensors
from dist_train.run.session import Session
from dist_train.run.tracking.jsonl_tracker import JsonlTracker
from dist_train.training.meter import Meter
from dist_train.training.progress import Progress
from dist_train.training.protocols import Stateful
from tests.dist.sessions import BUILTIN, build


class Subject(Protocol):
    """A Stateful with something to do that its state decides, and something that tells how it stands."""

    stateful: Stateful

    def act(self) -> None: ...
    def stand(self) -> Any: ...


class TheModel:
    def __init__(self) -> None:
        with seeded("a model"):
            self.stateful = sync_batch_norm(FinancialClassifier(4, 8, 2), Collectives(World()))

    def act(self) -> None:
        self.stateful(torch.arange(24.0).view(6, 4))

    def stand(self) -> Any:
        return [t.tolist() for t in self.stateful.state_dict().values()]


class TheOptimizer:
    def __init__(self) -> None:
        with seeded("a model"):
            self.model: nn.Module = nn.Linear(3, 2)
        self.stateful = AdamW(self.model, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, undecayed={"bias"})

    def act(self) -> None:
        parameters = self.stateful.parameters
        loss = self.model(torch.ones(5, 3)).square().sum()
        gradients = torch.autograd.grad(loss, parameters.parameters)
        flat = parameters.zeros()
        torch._foreach_copy_(parameters.views(flat), list(gradients))
        self.stateful.step(flat, 0.1, torch.tensor(True))
        with seeded("a model"):  # the weights are another part's business: a step starts from the same ones
            self.model.reset_parameters()  # type: ignore[operator]

    def stand(self) -> Any:
        return {name: t.tolist() for name, t in self.stateful.state_dict().items()}


class TheAverage:
    def __init__(self) -> None:
        self.model = nn.Linear(2, 1)
        copied = deepcopy(self.model)
        self.stateful = MovingAverage(copied, self.model, FlatParameters(self.model.parameters()), 0.5)

    def act(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(1.0)
        self.stateful.update(True)

    def stand(self) -> Any:
        return [t.tolist() for t in self.stateful.state_dict().values()]


class TheMeter:
    def __init__(self) -> None:
        self.stateful = Meter()

    def act(self) -> None:
        self.stateful.add(1.3, 3.0)

    def stand(self) -> Any:
        return self.stateful.state_dict()["sums"].tolist()


class TheProgress:
    def __init__(self) -> None:
        self.stateful = Progress()

    def act(self) -> None:
        progress = self.stateful
        progress.step += 1
        progress.position = Position(progress.position.epoch + 1, 7 * progress.step)
        progress.note_validation([0.5, 0.7, 0.6][progress.step % 3])
        progress.train_seconds += 0.1

    def stand(self) -> Any:
        return vars(self.stateful)


SUBJECTS: list[Callable[[], Subject]] = [TheModel, TheOptimizer, TheAverage, TheMeter, TheProgress]


def through_a_file(state: Mapping[str, Any]) -> Any:
    """The state as it comes back from a checkpoint."""
    if all(isinstance(value, Tensor) for value in state.values()):
        return unpack_tensors(pack_tensors(state), "test")
    return unpack_json(pack_json(dict(state)), "test")


@pytest.mark.parametrize("make", SUBJECTS)
@pytest.mark.parametrize("acts", [0, 1, 3])
def test_round_trip(make: Callable[[], Subject], acts: int) -> None:
    old, new = make(), make()
    for _ in range(acts):
        old.act()
    saved = through_a_file(old.stateful.state_dict())
    new.stateful.load_state_dict(saved)
    if acts:
        assert old.stand() != make().stand(), "nothing has changed: equality would prove nothing"
        assert new.stand() == old.stand()
    for _ in range(2):
        old.act()
        new.act()
    assert new.stand() == old.stand()
    again = make()
    again.stateful.load_state_dict(saved)  # what was saved does not change with what was loaded from it
    again.act()
    again.act()
    assert again.stand() == old.stand()


def test_the_journal_goes_back_to_where_it_was_saved(tmp_path: Path) -> None:
    old = JsonlTracker(tmp_path / "metrics.jsonl")
    old.log({"step": 1, "loss": 0.5})
    saved = through_a_file(old.state_dict())
    old.log({"step": 2, "loss": 0.4})
    old.close()
    new = JsonlTracker(tmp_path / "metrics.jsonl")
    new.load_state_dict(saved)
    new.log({"step": 2, "loss": 0.3})
    new.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert '"loss": 0.5' in lines[0]
    assert '"loss": 0.3' in lines[1]


def steps(session: Session, count: int) -> None:
    for batches, position in session.feed.steps(session.progress.position):
        outcome = session.step(batches, session.progress.step, wants_stop=False)
        session.progress.step += 1
        session.progress.position = position
        session.meter.add(*outcome.totals[:2].tolist())
        count -= 1
        if count == 0:
            return


@pytest.mark.parametrize("more", [[], ["train.ema_decay=0.9", "model.embedding_dim=3", "train.precision=float64"]])
def test_a_session_goes_on_to_the_same_bits(more: list[str]) -> None:
    collectives = Collectives(World())
    whole, first, second = (build(collectives, [*BUILTIN, *more]) for _ in range(3))
    steps(whole, 9)
    steps(first, 5)
    parts = {name: through_a_file(part) for name, part in first.tensor_parts().items()}
    second.restore(parts | {"state.json": {"progress": through_a_file(first.progress.state_dict())}})
    steps(second, 4)
    for name, part in whole.tensor_parts().items():
        for key, value in part.items():
            assert torch.equal(second.tensor_parts()[name][key], value), f"{name}: {key}"
    assert second.meter.take_loss() == whole.meter.take_loss()
