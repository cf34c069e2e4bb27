"""What is trained: model, optimizer and everything else that a checkpoint holds, built from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.config.schema import JobConfig
from dist_train.data.feed import Feed
from dist_train.data.sampler import PositionSampler
from dist_train.determinism.batch_norm import sync_batch_norm, zero_grad_of_biases_before_batchnorm
from dist_train.determinism.dropout import convert_dropout
from dist_train.determinism.keyed_random import RowRandom
from dist_train.determinism.sliced_modules import check_row_wise, convert_virtual_ranks
from dist_train.determinism.slices import Slices
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.run.checkpoint.state import Parts
from dist_train.tasks.base import Task
from dist_train.training.evaluation import evaluate
from dist_train.training.graph import CudaRecorder, GraphStep
from dist_train.training.loop import Intervals, Loop
from dist_train.training.meter import Meter
from dist_train.training.optimizer import AdamW, average_of
from dist_train.training.plan import Plan
from dist_train.training.precision import autocast_dtype_of
from dist_train.training.progress import Progress
from dist_train.training.protocols import Batch, Save, Stateful, Track
from dist_train.training.reduction import DDPReducer, GradientReducer, SliceReducer
from dist_train.training.schedule import learning_rate
from dist_train.training.step import EagerStep, Step

# Steps that may be on their way to a GPU: enough to keep it busy while the host looks after a line or a signal.
STEPS_AHEAD = 8


class Session:
    """The objects of one training run on this rank, wired together.

    `scored` is the model whose weights are evaluated and shipped: the moving average where there is one.
    """

    def __init__(self, config: JobConfig, task: Task, collectives: Collectives) -> None:
        train = config.train
        self.config = config
        self.task = task
        self.random = random = RowRandom(config.run.seed)
        plain = task.model()
        self.average = average_of(plain, train.ema_decay) if train.ema_decay else None
        slices = Slices(random)
        self.model = self._synchronised(convert_dropout(plain, random), slices, collectives)
        self.optimizer = AdamW(
            self.model,
            weight_decay=config.optim.weight_decay,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            eps=config.optim.eps,
        )
        sampler = PositionSampler(
            len(task.splits["train"]),
            rank=collectives.rank,
            world_size=collectives.size,
            seed=config.run.seed,
            global_batch_size=train.global_batch_size,
            accumulation_steps=train.accumulation_steps,
            num_slices=train.virtual_ranks,
            shuffle_block_rows=config.data.shuffle_block_rows,
        )
        self.feed = Feed(task.splits["train"], sampler)
        self.total_steps = min(train.epochs * self.feed.steps_per_epoch, train.max_steps or 2**63)
        self.meter = Meter()
        self.progress = Progress()
        trained, reduction = self._reduced(slices, collectives)

        def begin(batch: Batch) -> None:
            slices.begin(batch.slices, batch.epoch, batch.first_row)

        eager = EagerStep(
            trained,
            task.objective(),
            self.optimizer,
            self.learning_rate,
            begin,
            reduction,
            collectives,
            max_grad_norm=config.optim.max_grad_norm,
            autocast_dtype=autocast_dtype_of(train.precision),
        )
        self.step: Step = GraphStep(eager, random, CudaRecorder()) if self._recordable(collectives) else eager
        self._tensors: dict[str, Stateful] = {
            "model.pth": self.model,
            "optimizer.pth": self.optimizer,
            "meter.pth": self.meter,
        }
        if self.average:
            self._tensors["average.pth"] = self.average

    @property
    def scored(self) -> nn.Module:
        """The model to evaluate."""
        return self.average.module if self.average else self.model

    @property
    def learning_rate(self) -> Callable[[int], float]:
        """The schedule of this run."""
        return partial(
            learning_rate,
            peak=self.config.optim.lr,
            warmup_steps=self.config.schedule.warmup_steps,
            total_steps=self.total_steps,
            min_ratio=self.config.schedule.min_lr_ratio,
        )

    @property
    def trains_on(self) -> bool:
        """Whether there are steps to come."""
        return self.progress.trains_on(self.total_steps, self.config.train.early_stopping_patience)

    def after_update(self) -> None:
        """Follow the weights with their moving average."""
        if self.average:
            self.average.update_parameters(self.model)

    def score(self, split: str, collectives: Collectives) -> dict[str, Any] | None:
        """Metrics of the scored model on a split, the same on every rank; None when the split has no rows."""
        rows = self.task.splits[split]
        return evaluate(self.scored, rows, self.task, self.config.evaluation.batch_size, collectives)

    def tensor_parts(self) -> Parts:
        """All tensors of a checkpoint."""
        return {name: dict(part.state_dict()) for name, part in self._tensors.items()}

    def restore(self, parts: Parts) -> None:
        """Take over a checkpoint's tensors and progress; UserError when they are not those of this model."""
        for name, part in self._tensors.items():
            if name not in parts:
                raise UserError(f"the checkpoint has no part {name}: it was written with train.ema_decay off")
            try:
                part.load_state_dict(parts[name])
            except (RuntimeError, KeyError) as error:
                raise UserError(
                    f"the checkpoint's {name} does not fit this model: {str(error).splitlines()[0]}"
                ) from None
        self.progress.load_state_dict(parts["state.json"]["progress"])

    def plan(self, world: World) -> Plan:
        """What this run is going to do."""
        train, model = self.config.train, self.model
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Plan(
            world=world,
            virtual_ranks=train.virtual_ranks,
            rows={name: len(rows) for name, rows in self.task.splits.items()},
            class_names=self.task.class_names,
            num_inputs=self.task.num_inputs,
            parameters=parameters,
            trainable=trainable,
            global_batch_size=train.global_batch_size,
            accumulation_steps=train.accumulation_steps,
            steps_per_epoch=self.feed.steps_per_epoch,
            total_steps=self.total_steps,
            learning_rate=self.learning_rate,
        )

    def _recordable(self, collectives: Collectives) -> bool:
        """Whether a step can be one CUDA graph: all of it runs on the GPU, and the host is asked for nothing."""
        train = self.config.train
        resident = self.task.splits["train"].on_device
        return resident and collectives.runs_on_device and train.virtual_ranks is None and train.accumulation_steps == 1

    def _synchronised(self, plain: nn.Module, slices: Slices, collectives: Collectives) -> nn.Module:
        """The model, computing over the rows of all ranks: exactly where virtual ranks are set."""
        virtual_ranks = self.config.train.virtual_ranks
        if virtual_ranks is None:
            model = sync_batch_norm(plain, collectives)
        else:
            model = convert_virtual_ranks(plain, slices, collectives)
            check_row_wise(model, self.task.splits["train"].slice(0, 4), self.config.model.name)
        # A machine for GPUs may lack numba; the network computes the same without it, more slowly.
        if collectives.device.type == "cpu" and self.config.train.precision != "bf16" and find_spec("numba"):
            from dist_train.accel.cpu_mlp import fuse_sequences  # imports numba, which takes a while

            fuse_sequences(model, slices)
        return zero_grad_of_biases_before_batchnorm(model)

    def _reduced(self, slices: Slices, collectives: Collectives) -> tuple[nn.Module, GradientReducer]:
        """The model to call in training, and what sums its gradients over ranks."""
        virtual_ranks, parameters = self.config.train.virtual_ranks, self.optimizer.parameters
        if collectives.size == 1 or virtual_ranks:
            num_slices = (virtual_ranks or 1) // collectives.size
            return self.model, SliceReducer(slices, num_slices, parameters, collectives)
        # Buffers need no broadcast: synchronised BatchNorm leaves the same statistics on every rank.
        # The argument's name changed between torch 2.11 and 2.13.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        replicated = DistributedDataParallel(self.model, gradient_as_bucket_view=True, **{buffers: False})  # type: ignore[arg-type]
        self._settle_buckets(replicated)
        return replicated, DDPReducer(replicated, slices, parameters, collectives)

    def _settle_buckets(self, replicated: nn.Module) -> None:
        """Have the gradients laid out as they will stay, before the first step.

        DistributedDataParallel lays its buckets out anew after its first backward pass, and gradients are in them after
        the second. Where a gradient lies in a bucket decides in which order more than two ranks are summed: without
        this a resumed run's first step would be summed in another order than that of a run that was never interrupted.
        """
        replicated.eval()  # neither statistics nor dropout
        for _ in range(2):
            replicated(*self.task.splits["train"].slice(0, 1)).sum().backward()
        replicated.train()


def build_loop(
    config: JobConfig,
    session: Session,
    collectives: Collectives,
    *,
    save: Save,
    track: Track,
    wants_stop: Callable[[], bool],
) -> Loop:
    """The training loop of a session, in the rhythm of its configuration."""
    return Loop(
        session.step,
        session.feed,
        session.progress,
        session.meter,
        Intervals(
            total_steps=session.total_steps,
            log_steps=config.log.every_steps,
            save_steps=config.checkpoint.every_steps,
            evaluate_steps=config.evaluation.every_steps,
            patience=config.train.early_stopping_patience,
            steps_ahead=STEPS_AHEAD if collectives.device.type == "cuda" else 0,
        ),
        collectives,
        evaluate=lambda: session.score("valid", collectives),
        save=save,
        track=track,
        after_update=session.after_update,
        wants_stop=wants_stop,
    )


def scored_weights(parts: Parts) -> dict[str, Tensor]:
    """The weights of a checkpoint that are evaluated and shipped, under the names of the plain model."""
    if "average.pth" not in parts:
        return dict(parts["model.pth"])
    prefix = "module."
    return {n.removeprefix(prefix): t for n, t in parts["average.pth"].items() if n.startswith(prefix)}
