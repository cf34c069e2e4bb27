"""Who trains the job of `workload`: the tutorial loop, Lightning, Accelerate, this project; others: `array_peers`.

Each is written as its own documentation advises. DataLoaders have no workers: the comparison is about one thread, and a
worker would be another one. A contestant trains for a turn, and goes on in its next turn where it stood.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import workload
from dist_train.distributed.collectives import Collectives
from dist_train.run.session import Session, build_loop
from dist_train.training.protocols import Record

WARM_UP_STEPS, FEWEST_STEPS = 2, 4


class Contestant(Protocol):
    """Trains for at least `seconds` and `FEWEST_STEPS` steps; rows per second, without start-up and first steps."""

    def __call__(self, seconds: float) -> float: ...


@dataclass
class Clock:
    """Counts the rows of a turn from its `WARM_UP_STEPS`-th step on."""

    seconds: float
    device: torch.device
    steps: int = 0
    rows: int = 0
    rate: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def finished(self, rows: int) -> bool:
        """Count a step; true when the turn is over."""
        self.steps += 1
        self.rows += rows
        if self.steps == WARM_UP_STEPS:
            wait_for(self.device)
            self.start, self.rows = time.perf_counter(), 0
        passed = time.perf_counter() - self.start
        if self.steps < WARM_UP_STEPS + FEWEST_STEPS or passed < self.seconds:
            return False
        wait_for(self.device)
        self.rate = self.rows / (time.perf_counter() - self.start)
        return True


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tutorial(features: Tensor, targets: Tensor, batch_size: int, device: torch.device) -> Contestant:
    """DataLoader over a TensorDataset, AdamW as it comes, a loss read with .item() at every step."""
    model = workload.model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.LEARNING_RATE)
    scheduler = CosineAnnealingLR(optimizer, workload.TOTAL_STEPS)
    batches = _endless(_loader(features, targets, batch_size, device))

    def step() -> int:
        x, y = next(batches)
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), workload.MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        loss.item()
        return len(y)

    return _in_turns(step, device)


def accelerate(features: Tensor, targets: Tensor, batch_size: int, device: torch.device) -> Contestant:
    """Hugging Face Accelerate's training loop: prepare, backward and clipping are its own."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    model = workload.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.LEARNING_RATE)
    scheduler = CosineAnnealingLR(optimizer, workload.TOTAL_STEPS)
    loader = _loader(features, targets, batch_size, device)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    batches = _endless(loader)

    def step() -> int:
        x, y = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), workload.MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        return len(y)

    return _in_turns(step, device)


def lightning(features: Tensor, targets: Tensor, batch_size: int, device: torch.device) -> Contestant:
    """A LightningModule and a Trainer without logger, checkpoints and progress bar."""
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.model()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.AdamW(self.parameters(), lr=workload.LEARNING_RATE)
            scheduler = CosineAnnealingLR(optimizer, workload.TOTAL_STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Watchdog(L.Callback):
        def __init__(self, clock: Clock) -> None:
            self.clock = clock

        def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
            batch = arguments[2]
            trainer.should_stop = trainer.should_stop or self.clock.finished(len(batch[1]))

    classifier, loader = Classifier(), _loader(features, targets, batch_size, device)

    def turn(seconds: float) -> float:
        clock = Clock(seconds, device)
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=-1,
            gradient_clip_val=workload.MAX_GRAD_NORM,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Watchdog(clock)],
        )
        trainer.fit(classifier, loader)
        return clock.rate

    return turn


class Ours:
    """This project's own loop over a session, with its lines of metrics thrown away.

    On several ranks all of them take the turn; the clock of rank 0 ends it by the loop's own vote to stop. `steps`
    ends it after a number of steps instead.
    """

    def __init__(self, session: Session, collectives: Collectives) -> None:
        self.session = session
        self.collectives = collectives

    def __call__(self, seconds: float) -> float:
        """Rows per second of all ranks together."""
        self._train(0.0, WARM_UP_STEPS)
        rows, took, _ = self._train(seconds, FEWEST_STEPS)
        return rows / took

    def seconds_per_step(self, seconds: float) -> float:
        """Seconds of an optimizer step."""
        self._train(0.0, WARM_UP_STEPS)
        _, took, steps = self._train(seconds, FEWEST_STEPS)
        return took / steps

    def _train(self, seconds: float, fewest_steps: int) -> tuple[int, float, int]:
        """Rows, seconds and steps of a while of training."""
        session, progress = self.session, self.session.progress
        num_rows, first_step, rows = session.feed.num_rows, progress.step, progress.samples(session.feed.num_rows)
        self.collectives.all_gather_object(lambda: None)
        start = time.perf_counter()

        def over() -> bool:
            done = progress.step + 1 - first_step >= fewest_steps and time.perf_counter() - start >= seconds
            return self.collectives.is_main and done

        build_loop(session.config, session, self.collectives, save=lambda _: None, track=_forget, wants_stop=over).run()
        wait_for(self.collectives.device)
        took = time.perf_counter() - start
        return progress.samples(num_rows) - rows, took, progress.step - first_step


def _forget(_record: Record) -> None:
    """A line of metrics that nobody reads."""


def _in_turns(step: Callable[[], int], device: torch.device) -> Contestant:
    def turn(seconds: float) -> float:
        clock = Clock(seconds, device)
        while not clock.finished(step()):
            pass
        return clock.rate

    return turn


def _loader(features: Tensor, targets: Tensor, batch_size: int, device: torch.device) -> DataLoader[Any]:
    pinned = device.type == "cuda"
    return DataLoader(TensorDataset(features, targets), batch_size=batch_size, shuffle=True, pin_memory=pinned)


def _endless(loader: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader))
