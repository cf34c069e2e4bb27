"""A configuration and a world become a run. `train` is the table of contents; each line of it is a room."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_train import __version__
from dist_train.checkpoint.checkpoints import Checkpoints, Found
from dist_train.checkpoint.commit import commit, sweep, write_atomically
from dist_train.checkpoint.run_folder import RunFolder, RunLock, this_process
from dist_train.checkpoint.state import Parts, encode_parts, pack_json, weights_sha256
from dist_train.config.differences import differences
from dist_train.config.load import config_to_yaml
from dist_train.config.rules import given_class_weights
from dist_train.config.schema import JobConfig
from dist_train.data.dataset import Dataset, load_dataset
from dist_train.data.encoder import Encoder
from dist_train.errors import TrainingFault, UserError
from dist_train.models.registry import check_model_name
from dist_train.runtime.collectives import Collectives
from dist_train.runtime.console import log, terminal
from dist_train.runtime.stopping import StopFlag
from dist_train.runtime.world import World, process_group
from dist_train.session import Session, dtype_of, scored_weights
from dist_train.tracking.journal import Journal
from dist_train.tracking.screen import Screen
from dist_train.tracking.wandb_run import WandbRun, choose_mode
from dist_train.training.evaluation import evaluate
from dist_train.training.loop import Ending, Loop, Rhythm
from dist_train.training.parts import Record

T = TypeVar("T")


def train(config: JobConfig, world: World, environ: Mapping[str, str], *, dry_run: bool = False) -> None:
    """Train a run to its end, to an agreed stop, or (`dry_run`) print its plan and write nothing."""
    check_model_name(config.model)
    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag().listening())
        stack.enter_context(process_group(world, config.runtime.timeout_seconds))
        collectives = Collectives(world)
        dataset = _load(config, collectives)
        given_class_weights(config.train, dataset.encoder.class_names)  # refused before anything is written
        if dry_run:
            _announce(Session(config, dataset, collectives), world)
            return
        folder = RunFolder(Path(config.run.dir) / config.run.name)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        found = collectives.from_first(
            lambda: _guard(lambda: _open_folder(folder, config, checkpoints, stack, environ), "the run folder")
        )
        dataset = _check_resume(found, config, dataset, collectives)
        session = Session(config, dataset, collectives)
        if found:
            session.restore(found.parts)
        collectives.from_first(lambda: _take_over(folder, config, checkpoints, session.progress.step))
        _announce(session, world)
        books = Books(folder, config, session, found, environ) if collectives.is_first else None
        if books:
            stack.enter_context(books)

        def save(step: int) -> None:
            def write() -> None:
                parts = _checkpoint_parts(config, session, dataset, books, world)
                checkpoints.write(step, parts, session.progress.best_step)

            collectives.from_first(lambda: _guard(write, f"the checkpoint of step {step}"))

        ending = _loop(config, session, collectives, books, stop, save).run()
        if books:
            books.close(failed=False)
        if ending is Ending.STOPPED:
            collectives.from_first(lambda: _mark_for_requeue(folder, session))
            return
        log.info("%s after %d steps", ending.value, session.progress.step)
        _finish(config, session, dataset, collectives, folder, checkpoints, world)


def _load(config: JobConfig, collectives: Collectives, encoder: Encoder | None = None) -> Dataset:
    return load_dataset(
        config.data,
        collectives,
        seed=config.run.seed,
        one_hot=config.model.embedding_dim is None,
        dtype=dtype_of(config.train.precision),
        encoder=encoder,
    )


def _announce(session: Session, world: World) -> None:
    for line in session.plan(world).lines():
        log.info("%s", line)


def _open_folder(
    folder: RunFolder, config: JobConfig, checkpoints: Checkpoints, stack: ExitStack, environ: Mapping[str, str]
) -> Found | None:
    """Rank 0: create and lock the run folder; the checkpoint to go on from, if any."""
    holder = this_process(environ.get("SLURM_JOB_ID"))
    folder.create()
    lock = stack.enter_context(RunLock(folder.lock, holder))
    if config.run.resume == "never":
        former = folder.move_aside()
        if former:
            lock.release()
            log.info("the run that was in %s is now in %s", folder.path, former)
            folder.create()
            stack.enter_context(RunLock(folder.lock, holder))
    sweep(folder.path)
    sweep(folder.checkpoints)
    found, skipped = checkpoints.newest()
    for reason in skipped:
        log.warning("skipped a damaged checkpoint: %s", reason)
    if skipped and not found:
        raise UserError(
            f"{folder.checkpoints}: no checkpoint verifies ({skipped[0]}); "
            "run.resume=never starts anew and keeps them aside"
        )
    if found:
        _refuse_changes(found, config)
        _check_best(found, config, checkpoints)
    return found


def _take_over(folder: RunFolder, config: JobConfig, checkpoints: Checkpoints, step: int) -> None:
    """Rank 0: the run goes on from `step`; until here a refusal has left the folder as it was."""

    def write() -> None:
        checkpoints.drop_after(step)
        folder.requeue.unlink(missing_ok=True)
        write_atomically(folder.config, config_to_yaml(config).encode())

    _guard(write, "the run folder")


def _refuse_changes(found: Found, config: JobConfig) -> None:
    state = found.parts["state.json"]
    now = json.loads(json.dumps(asdict(config)))  # as the checkpoint has it: the keys of a mapping are text
    harmful, harmless = differences(state["config"], now)
    for line in harmless:
        log.info("changed since the checkpoint: %s", line)
    if harmful and not config.run.force:
        raise UserError(
            f"the checkpoint of step {found.step} was trained with another configuration: {'; '.join(harmful)}. "
            "Set them back, choose another run.name, start anew with run.resume=never, or insist with run.force=true"
        )
    for line in harmful:
        log.warning("forced to go on although %s", line)


def _check_best(found: Found, config: JobConfig, checkpoints: Checkpoints) -> None:
    """Find out now, and not when training is over, whether the best weights so far can be shipped."""
    progress = found.parts["state.json"]["progress"]
    best = progress["best_step"]
    if best is None or best == found.step:
        return
    try:
        checkpoints.read(best)
        return
    except UserError as error:
        # When a newer best one was skipped as damaged, this one may be gone for good reason: training finds the
        # newer one again.
        if best in checkpoints.steps() and not config.run.force:
            raise UserError(
                f"{error}. It holds the best weights so far: start anew with run.resume=never, "
                "or go on without it with run.force=true"
            ) from None
        log.warning("the best weights so far are lost, going on without them: %s", error)
    progress |= {"best_step": None, "best_loss": None}


def _check_resume(found: Found | None, config: JobConfig, dataset: Dataset, collectives: Collectives) -> Dataset:
    """The dataset to go on with: encoded as the checkpoint's model knows it."""
    if not found:
        return dataset
    state = found.parts["state.json"]
    if state["world_size"] != collectives.size:
        log.warning(
            "the checkpoint was trained on %d ranks, this is a world of %d: results agree to rounding, not to the bit",
            state["world_size"], collectives.size,
        )  # fmt: skip
    log.info("resuming from the checkpoint of step %d", found.step)
    if state["data_sha256"] == dataset.sha256:
        return dataset
    if not config.run.force:
        raise UserError(
            f"{config.data.path}: the file has changed since the checkpoint of step {found.step}; "
            "choose another run.name, start anew with run.resume=never, or insist with run.force=true"
        )
    log.warning("forced to go on although the data have changed")
    return _load(config, collectives, Encoder.from_description(state["encoder"], found.parts["encoder.pth"]))


class Books:
    """What rank 0 writes about a run: metrics.jsonl, wandb, the screen."""

    def __init__(
        self, folder: RunFolder, config: JobConfig, session: Session, found: Found | None, environ: Mapping[str, str]
    ) -> None:
        state = found.parts["state.json"] if found else None
        self.journal = Journal(folder.metrics)
        self.wandb = WandbRun(
            folder=folder.path,
            name=config.run.name,
            project=config.wandb.project,
            mode=choose_mode(config.wandb.mode, environ),
            config=asdict(config),
            run_id=state["wandb"]["run_id"] if state else None,
            sent_step=self.journal.last_step,
        )
        self.journal.load_state_dict(state["journal"] if state else {"bytes": 0})
        self.screen = Screen(
            terminal(),
            total_steps=session.total_steps,
            num_epochs=config.train.epochs,
            start_step=session.progress.step,
        )

    def track(self, record: Record) -> None:
        """Write a line of metrics everywhere."""
        _guard(lambda: self.journal.log(record), "metrics.jsonl")
        self.wandb.log(record)
        self.screen.log(record)

    def close(self, *, failed: bool) -> None:
        """End all of them; a second call does nothing."""
        self.screen.close()
        self.wandb.close(failed=failed)
        self.journal.close()

    def __enter__(self) -> Books:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def _checkpoint_parts(
    config: JobConfig, session: Session, dataset: Dataset, books: Books | None, world: World
) -> Parts:
    assert books is not None
    state = {
        "progress": session.progress.state_dict(),
        "journal": books.journal.state_dict(),
        "wandb": books.wandb.state_dict(),
        "config": asdict(config),
        "encoder": dataset.encoder.describe(),
        "data_sha256": dataset.sha256,
        "world_size": world.size,
        "dist_train": __version__,
        "torch": torch.__version__,
    }
    return session.tensor_parts() | {"encoder.pth": dict(dataset.encoder.state_dict()), "state.json": state}


def _loop(
    config: JobConfig, session: Session, collectives: Collectives, books: Books | None, stop: StopFlag, save: Any
) -> Loop:
    def validate() -> dict[str, Any] | None:
        return _score(session, "valid", config, collectives)

    return Loop(
        session.step,
        session.feed,
        session.progress,
        session.meter,
        Rhythm(
            total_steps=session.total_steps,
            log_steps=config.log.every_steps,
            save_steps=config.checkpoint.every_steps,
            evaluate_steps=config.evaluation.every_steps,
            patience=config.train.early_stopping_patience,
        ),
        collectives,
        evaluate=validate,
        save=save,
        track=books.track if books else lambda _: None,
        after_update=session.after_update,
        wants_stop=lambda: stop.raised,
    )


def _score(session: Session, split: str, config: JobConfig, collectives: Collectives) -> dict[str, Any] | None:
    rows = session.dataset.splits[split]
    return evaluate(
        session.scored, rows, session.dataset.encoder.class_names, config.evaluation.batch_size, collectives
    )


def _finish(
    config: JobConfig,
    session: Session,
    dataset: Dataset,
    collectives: Collectives,
    folder: RunFolder,
    checkpoints: Checkpoints,
    world: World,
) -> None:
    """Ship the best weights: score them, commit `model/`, write the summary."""
    best = session.progress.best_step
    if best is not None and best != session.progress.step:
        parts = collectives.from_first(lambda: checkpoints.read(best))
        session.scored.load_state_dict(scored_weights(parts))
    scores = {split: _score(session, split, config, collectives) for split in ("valid", "test")}
    weights = dict(session.scored.state_dict())
    summary = _summary(config, session, world, weights) | scores
    model = {
        "model.pth": weights,
        "encoder.pth": dict(dataset.encoder.state_dict()),
        "encoder.json": dataset.encoder.describe(),
        "training.json": {
            "step": best or session.progress.step,
            "data_sha256": dataset.sha256,
            "weights_sha256": summary["weights_sha256"],
        },
    }

    def write() -> None:
        commit(folder.model, encode_parts(model))
        write_atomically(folder.summary, pack_json(summary))

    collectives.from_first(lambda: _guard(write, "the trained model"))
    for split, metrics in scores.items():
        if metrics:
            auroc = "-" if metrics["auroc"] is None else f"{metrics['auroc']:.4f}"
            log.info(
                "%s  loss %.4f  auroc %s  macro-F1 %.4f  (weights of step %d)",
                split, metrics["loss"], auroc, metrics["macro_f1"], best or session.progress.step,
            )  # fmt: skip
    log.info("summary in %s", folder.summary)


def _summary(config: JobConfig, session: Session, world: World, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    progress = session.progress
    samples = progress.samples(session.feed.num_rows)
    return {
        "run": config.run.name,
        "world_size": world.size,
        "device": world.device.type,
        "backend": world.backend,
        "steps": progress.step,
        "epochs": samples / session.feed.num_rows,
        "samples": samples,
        "train_seconds": progress.train_seconds,
        "samples_per_second": samples / progress.train_seconds,
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "trainable_parameters": sum(p.numel() for p in session.model.parameters() if p.requires_grad),
        "classes": session.dataset.encoder.class_names,
        "best_step": progress.best_step,
        "seed": config.run.seed,
        "weights_sha256": weights_sha256(weights),
        "data_sha256": session.dataset.sha256,
        "dist_train": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _guard(write: Callable[[], T], what: str) -> T:
    """Turn a failing disk into one line; what was committed before is untouched."""
    try:
        return write()
    except OSError as error:
        raise TrainingFault(f"{what} could not be written: {error}; what was saved before is intact") from None


def _mark_for_requeue(folder: RunFolder, session: Session) -> None:
    step = session.progress.step
    _guard(lambda: write_atomically(folder.requeue, pack_json({"step": step})), "the requeue marker")
    log.info("stopped at step %d of %d: saved; the same command continues", step, session.total_steps)
