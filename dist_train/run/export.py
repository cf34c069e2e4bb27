"""What leaves a run: its checkpoints on the way, and at the end the best weights, scored, with a summary."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dist_train import __version__
from dist_train.config.compatibility import FORMATS
from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.slurm import Attempt
from dist_train.distributed.world import World
from dist_train.errors import os_errors_as_faults
from dist_train.risk.analysis import positive_class
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import commit
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import Parts, encode_parts, pack_json
from dist_train.run.checkpoint.trained_model import DESCRIPTION, trained_model_parts
from dist_train.run.scoring.scores import note_calibration, score_splits
from dist_train.run.session import Session, scored_weights, unsaved_weights
from dist_train.run.tracking.console_tracker import describe_scores
from dist_train.system.console import log
from dist_train.system.files import write_atomically
from dist_train.system.machine import describe_machine, peak_memory_bytes
from dist_train.tasks.base import HasBaselines, ShipsFiles


def checkpoint_parts(
    config: JobConfig,
    session: Session,
    tensors: Parts,
    trackers: Mapping[str, Any],
    world: World,
    environ: Mapping[str, str],
) -> Parts:
    """Everything that a run needs to go on, by name: `tensors` of the session, `trackers`, which is their state."""
    attempt = Attempt.from_environment(environ)
    state = {
        "format": FORMATS["checkpoint"],
        "progress": session.progress.state_dict(),
        **trackers,
        "config": asdict(config),
        "data_sha256": session.task.fingerprint,
        "world_size": world.size,
        "ranks_per_host": world.local_size,
        "job": attempt.job if attempt else None,
        "dist_train": __version__,
        "machine": describe_machine(world.device),
    }
    return tensors | {"task.json": session.task.description(), "state.json": state}


def export_best(
    config: JobConfig,
    session: Session,
    collectives: Collectives,
    folder: RunFolder,
    checkpoints: Checkpoints,
    world: World,
    witness: Mapping[str, Any],
) -> dict[str, Any]:
    """Score the best weights, commit `model/`, write the summary and return it on every rank.

    `witness` describes the chain of states that the run has written, on rank 0.
    """
    best = session.progress.best_step
    if best is not None and best != session.progress.step:
        # The weights alone: no rank but 0 reads the moments.
        weights = collectives.kept_on_rank_zero(lambda: scored_weights(checkpoints.read(best)))
        session.scored.load_state_dict(collectives.tensors_of_rank_zero(weights))
    scores, calibration = score_splits(session.scored, session.task, config, collectives)
    baselines = session.task.baselines() if isinstance(session.task, HasBaselines) else {}
    peak = max(collectives.all_gather_object(lambda: peak_memory_bytes(world.device)))

    class_names = session.task.class_names
    positive = positive_class(config.report, class_names, session.task.splits["train"].targets.cpu().numpy())

    # Of a sharded model they are gathered from all ranks.
    weights, unsaved = dict(session.scored.state_dict()), unsaved_weights(session.scored)

    def write() -> dict[str, Any]:
        model = trained_model_parts(
            config,
            session.task.description(),
            class_names,
            weights,
            step=best or session.progress.step,
            data_sha256=session.task.fingerprint,
            positive_class=class_names[positive],
            witness=witness,
            calibration=calibration,
            unsaved=unsaved,
        )
        if isinstance(session.task, ShipsFiles):
            model |= session.task.shipped_files(weights)
        digest = model[DESCRIPTION]["weights_sha256"]
        summary = (
            _summary(config, session, world, digest) | {"peak_memory_bytes": peak, "calibration": calibration} | scores
        )
        if baselines:
            summary["baselines"] = baselines
        commit(folder.model, encode_parts(model), folder.confirm)
        write_atomically(folder.summary, pack_json(summary))
        return summary

    summary = collectives.on_rank_zero(lambda: os_errors_as_faults(write, "the trained model"))
    for split, metrics in scores.items():
        if metrics:
            log.info(
                "%s  %s  (weights of step %d)",
                split,
                describe_scores(metrics, session.progress.selection.metric),
                best or session.progress.step,
            )
            if collectives.is_main:  # a warning is shown by each rank that has it
                _warn_of_base_rate(split, metrics)
    note_calibration(summary)
    for line in _beside(scores["test"], baselines):
        log.info("%s", line)
    _note_early_best(session)
    log.info("summary in %s", folder.summary)
    return summary


def _beside(test: Mapping[str, Any] | None, baselines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the test metrics of this model and of others."""
    if not (test and baselines):
        return []
    rows = {"this model": test, **baselines}
    names = ("accuracy", "macro_f1", "loss")
    width = max(map(len, rows))
    return [
        f"{'test rows':{width}}  {'  '.join(f'{name:>8}' for name in names)}",
        *(
            f"{model:{width}}  {'  '.join(f'{metrics[name]:8.4f}' for name in names)}"
            for model, metrics in rows.items()
        ),
    ]


def _note_early_best(session: Session) -> None:
    """Say so where most of the training came after the best validation."""
    progress, steps_per_epoch = session.progress, session.feed.steps_per_epoch
    best, waited = progress.best_step, progress.evaluations_without_gain
    if best is None or waited < 3 or 2 * best > progress.step:
        return
    epoch, epochs = -(-best // steps_per_epoch), -(-progress.step // steps_per_epoch)
    log.info(
        "the best validation %s was that of step %d of %d (epoch %d of %d): the %d evaluations after it were worse, as "
        "of a model that overfits; train.early_stopping_patience would have ended the run sooner",
        progress.selection.metric, best, progress.step, epoch, epochs, waited,
    )  # fmt: skip


def _warn_of_base_rate(split: str, metrics: Mapping[str, Any]) -> None:
    """Say so where the model is no better than a guess that is the same for every row.

    The best of those guesses is the class frequencies of the rows, weighted where the rows are; its log loss is their
    entropy, in nats.
    """
    rows = [scores.get("weight", scores["rows"]) for scores in metrics.get("per_class", {}).values()]
    if not rows:
        return
    base_rate = -sum(count / sum(rows) * math.log(count / sum(rows)) for count in rows if count)
    if metrics["loss"] >= base_rate:
        log.warning(
            "%s loss %.4f is no better than the base rate: the class frequencies alone, the same for every row, have a "
            "log loss of %.4f",
            split, metrics["loss"], base_rate,
        )  # fmt: skip


def _summary(config: JobConfig, session: Session, world: World, digest: str) -> dict[str, Any]:
    """Content of summary.json without scores; `digest` is the weights' SHA-256.

    `samples_per_second` is `samples` / `train_seconds`: all steps, and compilation in the first ones.
    """
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
        "classes": session.task.class_names,
        "best_step": progress.best_step,
        "selected_by": progress.selection.metric,
        "seed": config.run.seed,
        "weights_sha256": digest,
        "data_sha256": session.task.fingerprint,
        "dist_train": __version__,
        "machine": describe_machine(world.device),
        "python": platform.python_version(),
    }
