"""What is trained: model, optimizer and everything else that a checkpoint holds, built from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn

from dist_train.config.schema import JobConfig
from dist_train.data.sampler import PositionSampler
from dist_train.data.sources import Feed
from dist_train.determinism.guard import GeneratorGuard
from dist_train.determinism.recompute import recompute_layers
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.execution.audit.step import AuditedStep
from dist_train.execution.average import MovingAverage
from dist_train.execution.base import MAX_STEPS, GuardedStep, bind
from dist_train.execution.choose import choose_execution
from dist_train.execution.optimizer import AdamW, lr_multipliers, undecayed_parameters
from dist_train.run.checkpoint.state import Parts
from dist_train.system.console import log
from dist_train.tasks.base import Task
from dist_train.training.evaluation import evaluate
from dist_train.training.loop import Intervals, Loop
from dist_train.training.meter import Meter
from dist_train.training.plan import Plan
from dist_train.training.precision import autocast_dtype_of
from dist_train.training.progress import Progress
from dist_train.training.protocols import Partial, Ragged, Save, Source, Stateful, Track
from dist_train.training.schedule import learning_rate
from dist_train.training.selection import Selection
from dist_train.training.step import EagerStep, Step

# Steps that may be on their way to a GPU: enough to keep it busy while the host looks after a line or a signal.
STEPS_AHEAD = 8
# Rows of the steps that are computed together on the CPU: some milliseconds, after which a vote to stop is seen.
ROWS_AHEAD = 1024
# Epochs whose order is made in advance, at least and at most, of tables of no more rows: 8 bytes a row and epoch.
EPOCHS_AHEAD = 2, 8
ROWS_OF_SHORT_EPOCHS = 1 << 22
# Of the steps in which only this package's code takes part, the generator guard compares every so many.
STEPS_BETWEEN_GUARDS = 50
# Rows of the steps that are sent to a GPU together.
ROWS_AHEAD_ON_GPU = 1 << 20


class Session:
    """The objects of one training run on this rank, wired together.

    `scored` is the model whose weights are evaluated and exported: the moving average where there is one.
    """

    def __init__(self, config: JobConfig, task: Task, collectives: Collectives) -> None:
        train = config.train
        self.config = config
        self.task = task
        train_rows = task.splits["train"]
        _require_validation_rows(config, len(task.splits["valid"]))
        self.feed = Feed(train_rows, _sampler(config, train_rows, collectives))
        self.total_steps = min(train.epochs * self.feed.steps_per_epoch, train.max_steps or 2**63)
        self.execution = choose_execution(
            train,
            collectives,
            seed=config.run.seed,
            rows_on_device=train_rows.on_device,
            total_steps=self.total_steps,
            fsdp=config.runtime.fsdp,
            arithmetic=task.arithmetic,
        )
        plain, sample = task.model(self.execution.builds_on), train_rows.slice(0, 4)
        undecayed = undecayed_parameters(plain)
        multipliers = lr_multipliers(plain)
        copied = self.execution.place(deepcopy(plain)) if train.ema_decay else None
        if train.gradient_checkpointing:
            recompute_layers(plain, self.execution.context, config.model.name)
        self.model = self.execution.prepare(plain, sample, config.model.name)
        self.optimizer = AdamW(
            self.model,
            weight_decay=config.optim.weight_decay,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            eps=config.optim.eps,
            undecayed=undecayed,
            lr_multipliers=multipliers,
            lay_out=self.execution.lay_out,
            arithmetic=self.execution.context.arithmetic,
        )
        self.average: MovingAverage | None = None
        if train.ema_decay and copied is not None:
            self.average = MovingAverage(
                copied,
                self.model,
                self.optimizer.parameters,
                train.ema_decay,
                warm_up=train.ema_warmup,
                lay_out=self.execution.lay_out,
                arithmetic=self.execution.context.arithmetic,
            )
        self.meter = Meter()
        plateau = config.schedule.plateau_patience if config.schedule.name == "plateau" else None
        self.progress = Progress(Selection.of(train), plateau)
        trained, reducer = self.execution.reduce(self.model, self.optimizer.parameters, sample)
        eager = EagerStep(
            bind(trained, self.execution.context),
            task.objective(),
            self.optimizer,
            self.learning_rate,
            reducer,
            collectives,
            max_grad_norm=config.optim.max_grad_norm,
            autocast_dtype=autocast_dtype_of(train.precision),
            average=self.average,
        )
        step = self.execution.step(eager)
        self.audit = self._audited(step, eager) if config.runtime.audit_every_steps else None
        # Steps that can be put off are this package's own code, and the guard takes as long as a small one.
        every = STEPS_BETWEEN_GUARDS if self.execution.deferred is not None else 1
        self.step: Step = GuardedStep(self.audit or step, GeneratorGuard(collectives.device), every)
        self._tensors: dict[str, Stateful] = {
            "model.pth": self.model,
            "optimizer.pth": self.optimizer,
            "meter.pth": self.meter,
        }
        if self.average:
            self._tensors["average.pth"] = self.average

    def _audited(self, step: Step, eager: EagerStep) -> AuditedStep:
        if eager.collectives.device.type != "cpu":
            raise UserError("runtime.audit_every_steps: steps on a GPU are not audited: set it to null, or use the CPU")
        return AuditedStep(
            step,
            eager,
            self.model,
            self.execution.context,
            every=self.config.runtime.audit_every_steps or 1,
            seed=self.config.run.seed,
            batches_of=lambda rank: self.feed.of_rank(self.progress.position, rank),
        )

    @property
    def scored(self) -> nn.Module:
        """The model to evaluate."""
        return self.average.module if self.average else self.model

    @property
    def learning_rate(self) -> Callable[[int], float]:
        """The schedule of this run."""
        schedule = self.config.schedule
        rate = partial(
            learning_rate,
            peak=self.config.optim.lr,
            warmup_steps=schedule.warmup_steps,
            total_steps=self.total_steps,
            min_ratio=schedule.min_lr_ratio,
            name=schedule.name,
            factor=schedule.plateau_factor,
            arithmetic=self.task.arithmetic,
        )
        if schedule.name != "plateau":
            return rate
        return lambda step: rate(step, reductions=self.progress.reductions)

    @property
    def trains_on(self) -> bool:
        """Whether there are steps to come."""
        return self.progress.trains_on(self.total_steps, self.config.train.early_stopping_patience)

    @property
    def saves_here(self) -> bool:
        """Whether an uninterrupted run has a checkpoint of the step where this one stands, as it stands."""
        progress = self.progress
        due = progress.step % self.config.checkpoint.every_steps == 0
        return not progress.evaluation_due and (due or progress.best_step == progress.step or not self.trains_on)

    def score(self, split: str, collectives: Collectives) -> dict[str, Any] | None:
        """Metrics of the scored model on a split, the same on every rank; None when the split has no rows."""
        rows = self.task.splits[split]
        return evaluate(self.scored, rows, self.task, self.config.evaluation.batch_size, collectives)

    def tensor_parts(self) -> Parts:
        """All tensors of a checkpoint, whole on rank 0; called by all ranks.

        Raises:
            ComputationFault: an audit has found that a rank holds others than it ought to.
        """
        if self.audit:
            self.audit.require_intact()
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
        if self.audit:
            self.audit.note()
        self.progress.load_state_dict(parts["state.json"]["progress"])
        if parts["state.json"]["progress"]["best_step"] is not None and self.progress.best_step is None:
            log.warning("the best step so far was chosen by another metric: the choice begins anew (train.select_by)")

    def plan(self, world: World, chosen: Mapping[str, Any] | None = None) -> Plan:
        """What this run is going to do; `chosen` are the values of keys that were `auto`."""
        train, model = self.config.train, self.model
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Plan(
            world=world,
            virtual_ranks=train.virtual_ranks,
            rows={name: len(rows) for name, rows in self.task.splits.items()},
            class_names=self.task.class_names,
            num_inputs=self.task.num_inputs,
            inputs=self.task.inputs(),
            parameters=parameters,
            trainable=trainable,
            global_batch_size=train.global_batch_size,
            accumulation_steps=train.accumulation_steps,
            steps_per_epoch=self.feed.steps_per_epoch,
            total_steps=self.total_steps,
            learning_rate=self.learning_rate,
            chosen=chosen or {},
        )

    def close(self) -> None:
        """Give back what the device holds for the step; before the process group goes."""
        self.execution.close()


def _require_validation_rows(config: JobConfig, num_rows: int) -> None:
    """UserError where the configuration decides by validation rows, and there are none."""
    if num_rows:
        return
    asking = {
        "train.early_stopping_patience": config.train.early_stopping_patience is not None,
        "train.select_by": config.train.select_by is not None,
        "schedule.name=plateau": config.schedule.name == "plateau",
    }
    keys = ", ".join(key for key, asked in asking.items() if asked)
    if keys:
        raise UserError(
            f"{keys}: there are no validation rows to decide by: set data.validation_fraction, or leave the key out"
        )


def _sampler(config: JobConfig, rows: Source, collectives: Collectives) -> PositionSampler:
    train = config.train
    return PositionSampler(
        len(rows),
        rank=collectives.rank,
        world_size=collectives.size,
        seed=config.run.seed,
        global_batch_size=train.global_batch_size,
        accumulation_steps=train.accumulation_steps,
        num_slices=train.virtual_ranks,
        shuffle_block_rows=config.data.shuffle_block_rows,
        classes=rows.targets.cpu() if train.class_sampling else None,
        lengths=rows.lengths if isinstance(rows, Ragged) else None,
        padded_lengths=rows.padded_lengths if isinstance(rows, Ragged) else None,
        tokens_per_pass=config.text.tokens_per_pass,
        sort_batches=config.text.sort_batches,
        epochs_ahead=epochs_ahead(len(rows)) if collectives.device.type == "cuda" else 0,
    )


def epochs_ahead(num_rows: int) -> int:
    """Epochs whose order is made in advance on a GPU: as many as the steps have that are put off and under way."""
    least, most = EPOCHS_AHEAD
    return min(most, max(least, 2 * ROWS_AHEAD_ON_GPU // num_rows)) if num_rows <= ROWS_OF_SHORT_EPOCHS else 0


def build_loop(
    config: JobConfig,
    session: Session,
    collectives: Collectives,
    *,
    save: Save,
    track: Track,
    wants_stop: Callable[[], bool],
    put_off: bool = True,
) -> Loop:
    """The training loop of a session; its configuration says what is due at which step.

    `put_off`: steps may be sent off, or computed together, before it is known how the one before them has ended. Else
    the weights are those of the step before whenever `wants_stop` is called, and a stop holds from the next step on.
    """
    deferred = session.execution.deferred if put_off else None
    if deferred is not None and session.average is not None and not deferred.averages:
        deferred = None
    on_gpu = collectives.device.type == "cuda"
    steps_ahead = STEPS_AHEAD if on_gpu and put_off else 0
    if deferred is not None:
        rows = ROWS_AHEAD_ON_GPU if on_gpu else ROWS_AHEAD
        steps_ahead = min(MAX_STEPS - 1, rows // config.train.global_batch_size)
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
            steps_ahead=steps_ahead,
        ),
        collectives,
        evaluate=lambda: session.score("valid", collectives),
        save=save,
        track=track,
        wants_stop=wants_stop,
        deferred=deferred,
    )


def scored_weights(parts: Parts) -> dict[str, Tensor]:
    """The weights of a checkpoint that are evaluated and exported, under the names of the plain model."""
    if "average.pth" not in parts:
        return dict(parts["model.pth"])
    prefix = "module."
    return {n.removeprefix(prefix): t for n, t in parts["average.pth"].items() if n.startswith(prefix)}


def unsaved_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a model that its state_dict leaves out, since they are those of a pretrained one that is named."""
    return dict(model.unsaved_state_dict()) if isinstance(model, Partial) else {}
