"""What is trained: model, optimizer and everything else that a checkpoint holds, built from a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.config.rules import given_class_weights
from dist_train.config.schema import JobConfig
from dist_train.data.dataset import Dataset, load_dataset
from dist_train.data.encoder import Encoder
from dist_train.data.feed import Feed, ResidentRows
from dist_train.data.sampler import PositionSampler
from dist_train.determinism.batch_norm import sync_batch_norm, zero_grad_of_biases_before_batchnorm
from dist_train.determinism.dropout import convert_dropout
from dist_train.determinism.keyed_random import RowRandom
from dist_train.determinism.sliced_modules import check_row_wise, convert_virtual_ranks
from dist_train.determinism.slices import Slices
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.models.registry import build_model
from dist_train.run.checkpoint.state import Parts
from dist_train.training.evaluation import evaluate
from dist_train.training.graph import CudaRecorder, GraphStep
from dist_train.training.loop import Intervals, Loop
from dist_train.training.loss import CrossEntropy, balanced_weights
from dist_train.training.meter import Meter
from dist_train.training.optimizer import AdamW, average_of
from dist_train.training.plan import Plan
from dist_train.training.progress import Progress
from dist_train.training.protocols import Batch, Save, Stateful, Track
from dist_train.training.reduction import DDPReducer, GradientReducer, SliceReducer
from dist_train.training.schedule import learning_rate
from dist_train.training.step import EagerStep, Step

# Steps that may be on their way to a GPU: enough to keep it busy while the host looks after a line or a signal.
STEPS_AHEAD = 8


def dtype_of(precision: str) -> torch.dtype:
    """Type of weights and features; under bf16 both stay float32 and autocast does the rest."""
    return torch.float64 if precision == "float64" else torch.float32


class Session:
    """The objects of one training run on this rank, wired together.

    `scored` is the model whose weights are evaluated and shipped: the moving average where there is one.
    """

    def __init__(self, config: JobConfig, dataset: Dataset, collectives: Collectives) -> None:
        train, encoder = config.train, dataset.encoder
        self.config = config
        self.dataset = dataset
        self.random = random = RowRandom(config.run.seed)
        plain = build_model(
            config.model,
            input_dim=encoder.input_dim,
            embedded_sizes=encoder.embedded_sizes,
            num_classes=len(encoder.class_names),
            seed=config.run.seed,
        ).to(collectives.device, dtype_of(train.precision))
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
            len(dataset.splits["train"]),
            rank=collectives.rank,
            world_size=collectives.size,
            seed=config.run.seed,
            global_batch_size=train.global_batch_size,
            accumulation_steps=train.accumulation_steps,
            num_slices=train.virtual_ranks,
            shuffle_block_rows=config.data.shuffle_block_rows,
        )
        self.feed = Feed(dataset.splits["train"], sampler)
        self.total_steps = min(train.epochs * self.feed.steps_per_epoch, train.max_steps or 2**63)
        self.meter = Meter()
        self.progress = Progress()
        trained, reduction = self._reduced(slices, collectives)

        def begin(batch: Batch) -> None:
            slices.begin(batch.slices, batch.epoch, batch.first_row)

        eager = EagerStep(
            trained,
            CrossEntropy(self._class_weights(collectives), train.label_smoothing),
            self.optimizer,
            self.learning_rate,
            begin,
            reduction,
            collectives,
            max_grad_norm=config.optim.max_grad_norm,
            autocast_dtype=torch.bfloat16 if train.precision == "bf16" else None,
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
        encoder, rows = self.dataset.encoder, self.dataset.splits[split]
        return evaluate(self.scored, rows, encoder.class_names, self.config.evaluation.batch_size, collectives)

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
        share = -(-train.global_batch_size // train.accumulation_steps // world.size)
        item = dtype_of(train.precision).itemsize
        copies = 4 + (self.average is not None)  # weights, gradients, two moments; moving average
        return Plan(
            world=world,
            virtual_ranks=train.virtual_ranks,
            rows={name: len(rows) for name, rows in self.dataset.splits.items()},
            class_names=self.dataset.encoder.class_names,
            input_dim=self.dataset.encoder.input_dim,
            parameters=parameters,
            trainable=trainable,
            global_batch_size=train.global_batch_size,
            accumulation_steps=train.accumulation_steps,
            steps_per_epoch=self.feed.steps_per_epoch,
            total_steps=self.total_steps,
            learning_rate=self.learning_rate,
            data_bytes=sum(rows.resident_bytes for rows in self.dataset.splits.values()),
            state_bytes=(parameters * copies + trainable * self._slice_gradients(world)) * item,
            activation_bytes=share * item * _activations_of_a_row(model, self.dataset) * 2,  # and their gradients
        )

    def _slice_gradients(self, world: World) -> int:
        """Gradients of slices that a rank holds in the exact mode: its own, and all of them once they are gathered."""
        virtual_ranks = self.config.train.virtual_ranks or 0
        gathered = virtual_ranks if world.size > 1 else 0  # alone, its own are all
        return virtual_ranks // world.size + gathered

    def _recordable(self, collectives: Collectives) -> bool:
        """Whether a step can be one CUDA graph: all of it runs on the GPU, and the host is asked for nothing."""
        train = self.config.train
        resident = isinstance(self.dataset.splits["train"], ResidentRows)
        return resident and collectives.runs_on_device and train.virtual_ranks is None and train.accumulation_steps == 1

    def _synchronised(self, plain: nn.Module, slices: Slices, collectives: Collectives) -> nn.Module:
        """The model, computing over the rows of all ranks: exactly where virtual ranks are set."""
        virtual_ranks = self.config.train.virtual_ranks
        if virtual_ranks is None:
            model = sync_batch_norm(plain, collectives)
        else:
            model = convert_virtual_ranks(plain, slices, collectives)
            check_row_wise(model, self.dataset.splits["train"].slice(0, 4), self.config.model.name)
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
            replicated(*self.dataset.splits["train"].slice(0, 1)).sum().backward()
        replicated.train()

    def _class_weights(self, collectives: Collectives) -> Tensor | None:
        train, names = self.config.train, self.dataset.encoder.class_names
        if train.class_weights is None:
            return None
        given = given_class_weights(train, names)
        weights = (
            torch.tensor(given, dtype=torch.float64)
            if given
            else balanced_weights(self.dataset.splits["train"].targets, len(names))
        )
        return weights.to(collectives.device, dtype_of(self.config.train.precision))


def load_data(config: JobConfig, collectives: Collectives, encoder: Encoder | None = None) -> Dataset:
    """The data of a configuration; encoded by `encoder` where one is given, else by one that is fitted to them."""
    return load_dataset(
        config.data,
        collectives,
        seed=config.run.seed,
        one_hot=config.model.embedding_dim is None,
        dtype=dtype_of(config.train.precision),
        encoder=encoder,
    )


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


def _activations_of_a_row(model: nn.Module, dataset: Dataset) -> int:
    """Numbers that the modules of a model put out for one row, counted on a row of the training data."""
    count = 0

    def add(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal count
        count += output.numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if not list(m.children())]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(*dataset.splits["train"].slice(0, 1))
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return count
