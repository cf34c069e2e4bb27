"""Several runs become one model: they are trained one after another, and their probabilities are averaged."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from statistics import mean, stdev
from typing import Any, Protocol

from dist_train import __version__
from dist_train.config.members import MemberRun
from dist_train.config.schema import JobConfig
from dist_train.data.stores.store import is_store
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import TrainingFault, UserError, os_errors_as_faults
from dist_train.run.checkpoint.commit import CorruptCheckpoint, commit
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import Parts, encode_parts, pack_json
from dist_train.run.checkpoint.trained_model import DESCRIPTION, ENSEMBLE, read_trained_model
from dist_train.run.resume import open_ensemble
from dist_train.run.scoring.members import ensemble_parts, mean_probabilities, with_weights
from dist_train.run.scoring.predictions import Predictions, joined, mean_of
from dist_train.run.scoring.scores import Calibrated, calibrated, fitted, note_calibration
from dist_train.run.tracking.console_tracker import describe_scores
from dist_train.system.console import log
from dist_train.system.files import write_atomically
from dist_train.system.machine import describe_machine
from dist_train.tasks.base import Task
from dist_train.tasks.registry import description_in, load_task
from dist_train.training.protocols import Source

Summary = dict[str, Any]

OUT_OF_FOLD = "out_of_fold.parquet"
"""File in the folder of an ensemble of folds: probabilities of each row by the members that did not train on it."""


class TrainMember(Protocol):
    """Trains a run to its end and returns its summary; None for a dry run.

    `before_writing` is called by all ranks once the run has found nothing to refuse, before it writes.
    """

    def __call__(self, config: JobConfig, *, before_writing: Callable[[], None], dry_run: bool) -> Summary | None: ...


class Ensemble:
    """One job's work on an ensemble. What it opens is closed with `stack`."""

    def __init__(
        self,
        config: JobConfig,
        members: Sequence[MemberRun],
        folder: RunFolder,
        collectives: Collectives,
        environ: Mapping[str, str],
        stack: ExitStack,
        train_member: TrainMember,
    ) -> None:
        self.config = config
        self.members = members
        self.folder = folder
        self._collectives = collectives
        self._variables = environ
        self._stack = stack
        self._train_member = train_member
        self._opened = False

    def run(self, world: World, *, dry_run: bool) -> Summary | None:
        """Train the members that are not finished, average them, and return the summary of the whole.

        A dry run tries the first member. Raises Stopped when all ranks have agreed to stop, saved by then.
        """
        if self.config.data.folds is not None and is_store(self.config.data.path):
            raise UserError(
                f"{self.config.data.path}: a store holds one split: prepare one for each of the data.folds, and train "
                "each with data.fold"
            )
        log.info("ensemble of %d runs: %s", len(self.members), ", ".join(member.name for member in self.members))
        if dry_run:
            return self._train_member(self.members[0].config, before_writing=lambda: None, dry_run=True)
        summaries = [self._trained(member) for member in self.members]
        former = self._collectives.on_rank_zero(lambda: self._combined(summaries))
        if former:
            log.info("%s: the ensemble is finished: %s. Nothing is left to do", self.folder.path, _described(former))
            return former
        self._open()
        with self._collectives.heartbeat.phase("averaging the members"):
            return self._combine(summaries, world)

    def _trained(self, member: MemberRun) -> Summary:
        log.info("member %s, in %s", member.name, self.folder.path / member.name)
        # `never` starts the whole ensemble anew, once: that is done when its folder is opened.
        resume = "auto" if self._opened else self.config.run.resume
        config = replace(member.config, run=replace(member.config.run, resume=resume))
        summary = self._train_member(config, before_writing=self._open, dry_run=False)
        assert summary is not None, "training that is no dry run ends in a summary"
        return summary

    def _open(self) -> None:
        if not self._opened:
            open_ensemble(self.folder, self.config, self._stack, self._variables, self._collectives)
            self._opened = True

    def _combined(self, summaries: Sequence[Summary]) -> Summary | None:
        """Rank 0: the summary of the whole, where it is of these members as they are."""
        try:
            described = read_trained_model(self.folder.model)[ENSEMBLE]["members"]
            former: Summary = json.loads(self.folder.summary.read_bytes())
        except (OSError, ValueError, KeyError, CorruptCheckpoint, UserError):
            return None
        names = [member.name for member in self.members]
        digests = [summary["weights_sha256"] for summary in summaries]
        same = [m["name"] for m in described] == names and [
            m[DESCRIPTION]["weights_sha256"] for m in described
        ] == digests
        return former if same and former.get("ensemble") else None

    def _combine(self, summaries: Sequence[Summary], world: World) -> Summary:
        collectives = self._collectives
        parts = [collectives.on_rank_zero(partial(parts_of_member, self.folder, member)) for member in self.members]
        scored = scores_of_members(self.config, self.members, parts, collectives)

        def write() -> Summary:
            names = [member.name for member in self.members]
            model = ensemble_parts(self.config, names, parts, scored.calibration)
            summary = self._summary(summaries, model[ENSEMBLE], world) | {"calibration": scored.calibration}
            summary |= scored.metrics
            if scored.out_of_fold is not None:
                write_atomically(self.folder.path / OUT_OF_FOLD, scored.out_of_fold)
            commit(self.folder.model, encode_parts(model), self.folder.confirm)
            write_atomically(self.folder.summary, pack_json(summary))
            return summary

        summary = collectives.on_rank_zero(lambda: os_errors_as_faults(write, "the ensemble"))
        log.info("%s", _described(summary))
        note_calibration(summary)
        log.info("summary in %s", self.folder.summary)
        return summary

    def _summary(self, summaries: Sequence[Summary], described: Mapping[str, Any], world: World) -> Summary:
        """Content of summary.json without the scores of the whole. Steps, samples and seconds are sums."""
        total = {key: sum(summary[key] for summary in summaries) for key in ("steps", "samples", "train_seconds")}
        kept = ("seed", "steps", "best_step", "valid", "test", "weights_sha256")
        return {
            "run": self.config.run.name,
            "world_size": world.size,
            "device": world.device.type,
            "backend": world.backend,
            **total,
            "samples_per_second": total["samples"] / total["train_seconds"],
            "parameters": sum(summary["parameters"] for summary in summaries),
            "classes": described["classes"],
            "seed": self.config.run.seed,
            "weights_sha256": described["weights_sha256"],
            "data_sha256": described["data_sha256"],
            "dist_train": __version__,
            "machine": describe_machine(world.device),
            "python": platform.python_version(),
            "ensemble": {
                "members": [
                    {"name": member.name, **{key: summary[key] for key in kept}}
                    for member, summary in zip(self.members, summaries, strict=True)
                ],
                "of_members": {
                    split: _spread([summary[split] for summary in summaries]) for split in ("valid", "test")
                },
            },
        }


@dataclass(frozen=True)
class Scores:
    """What the members predict together; empty but on rank 0.

    `metrics`: `valid` and `test` of the summary. `calibration` is fitted to the validation rows, `out_of_fold` is a
    Parquet file; None where the configuration asks for none.
    """

    metrics: dict[str, Any]
    calibration: Calibrated | None
    out_of_fold: bytes | None


def scores_of_members(
    config: JobConfig, members: Sequence[MemberRun], parts: Sequence[Parts], collectives: Collectives
) -> Scores:
    """Score the validation rows of each fold by the mean of its members, and the test rows by the mean over folds.

    `parts` are those of the members' `model/`, in their order.
    """
    found: dict[str, list[Predictions]] = {"valid": [], "test": []}
    for fold, pairs in groupby(zip(members, parts, strict=True), lambda pair: pair[0].config.data.fold):
        runs = list(pairs)
        task = load_task(runs[0][0].config, collectives, description_in(runs[0][1]))
        trained = [with_weights(task, of_member["model.pth"]) for _, of_member in runs]
        for split, predictions in found.items():
            rows = task.splits[split]
            batch_size = config.evaluation.batch_size
            mean = mean_probabilities(trained, partial(_rows_of, split), batch_size, collectives)
            if mean is not None:
                predictions.append(Predictions.of(task, rows, mean, fold))
    if not found["valid"]:
        return Scores({}, None, None)
    validated = joined(found["valid"])
    # Of folds, each row is predicted by the members that have not seen it.
    calibration = fitted(config, validated.probabilities, validated.targets, validated.weights)
    metrics = {"valid": _scores(validated, calibration), "test": _scores(mean_of(found["test"]), calibration)}
    return Scores(metrics, calibration, None if validated.folds is None else validated.parquet())


def _scores(predictions: Predictions, calibration: Calibrated | None) -> dict[str, Any] | None:
    metrics = predictions.metrics()
    if metrics is None or calibration is None:
        return metrics
    after = replace(predictions, probabilities=calibrated(calibration, predictions.probabilities))
    return metrics | {"calibrated": after.metrics()}


def _rows_of(split: str, task: Task) -> Source:
    return task.splits[split]


def parts_of_member(folder: RunFolder, member: MemberRun) -> Parts:
    """The parts of a member's `model/`; `folder` is that of the ensemble.

    Raises:
        TrainingFault: they are damaged.
    """
    try:
        return read_trained_model(folder.path / member.name / "model")
    except CorruptCheckpoint as damage:
        raise TrainingFault(f"the trained model of a member is damaged: {damage}") from None


def _spread(metrics: Sequence[Mapping[str, Any] | None]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over the members of each metric that is a number for all of them."""
    found = [of_member for of_member in metrics if of_member]
    if len(found) < len(metrics):
        return {}
    numbers = [name for name in found[0] if all(isinstance(of_member.get(name), float) for of_member in found)]
    values = {name: [of_member[name] for of_member in found] for name in numbers}
    return {name: {"mean": mean(of_members), "std": stdev(of_members)} for name, of_members in values.items()}


def _described(summary: Summary) -> str:
    split = "test" if summary["test"] else "valid"
    return f"{split}  {describe_scores(summary[split] or {})}  (mean of {len(summary['ensemble']['members'])} members)"
