"""Several runs become one model: they are trained one after another, and their probabilities are averaged."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from statistics import mean, stdev
from typing import Any, Protocol

from torch import Tensor

from dist_train import __version__
from dist_train.config.members import MemberRun
from dist_train.config.schema import JobConfig
from dist_train.data.store import is_store
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import TrainingFault, UserError, os_errors_as_faults
from dist_train.run.checkpoint.commit import CorruptCheckpoint, commit
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import Parts, encode_parts, pack_json
from dist_train.run.checkpoint.trained_model import DESCRIPTION, ENSEMBLE, read_trained_model
from dist_train.run.members import Member, ensemble_parts, mean_probabilities, with_weights
from dist_train.run.predictions import Predictions, joined, mean_of
from dist_train.run.resume import open_ensemble
from dist_train.run.scoring import Calibrated, calibrated, fitted, note_calibration
from dist_train.run.tracking.console_tracker import describe_scores
from dist_train.system.console import log
from dist_train.system.files import write_atomically
from dist_train.system.machine import describe_machine
from dist_train.tasks.registry import description_in, load_task

Summary = dict[str, Any]


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
        parts = [collectives.on_rank_zero(partial(self._parts_of, member)) for member in self.members]
        validated, tested = self._predictions(parts)

        def write() -> Summary:
            of_folds = joined(validated)
            calibration = self._calibration(of_folds)
            model = ensemble_parts(self.config, [member.name for member in self.members], parts, calibration)
            scores = {"valid": _scores(of_folds, calibration), "test": _scores(mean_of(tested), calibration)}
            summary = self._summary(summaries, model[ENSEMBLE], world) | {"calibration": calibration} | scores
            if of_folds.folds is not None:
                write_atomically(self.folder.path / "out_of_fold.parquet", of_folds.parquet())
            commit(self.folder.model, encode_parts(model), self.folder.confirm)
            write_atomically(self.folder.summary, pack_json(summary))
            return summary

        summary = collectives.on_rank_zero(lambda: os_errors_as_faults(write, "the ensemble"))
        log.info("%s", _described(summary))
        note_calibration(summary)
        log.info("summary in %s", self.folder.summary)
        return summary

    def _calibration(self, validated: Predictions) -> Calibrated | None:
        """Of the mean of the members; of folds, each row is predicted by the members that have not seen it."""
        return fitted(self.config, validated.probabilities, validated.targets, validated.weights)

    def _predictions(self, parts: Sequence[Parts]) -> tuple[list[Predictions], list[Predictions]]:
        """Of each fold the mean of its members, for its validation rows and for the test rows; empty but on rank 0."""
        validated: list[Predictions] = []
        tested: list[Predictions] = []
        for fold, pairs in groupby(zip(self.members, parts, strict=True), lambda pair: pair[0].config.data.fold):
            runs = list(pairs)
            task = load_task(runs[0][0].config, self._collectives, description_in(runs[0][1]))
            members = [with_weights(task, of_member["model.pth"]) for _, of_member in runs]
            for split, found in (("valid", validated), ("test", tested)):
                predicted = self._mean(members, split)
                if predicted is not None:
                    found.append(Predictions.of(task, task.splits[split], predicted, fold))
        return validated, tested

    def _mean(self, members: Sequence[Member], split: str) -> Tensor | None:
        batch_size = self.config.evaluation.batch_size
        return mean_probabilities(members, lambda task: task.splits[split], batch_size, self._collectives)

    def _parts_of(self, member: MemberRun) -> Parts:
        folder = self.folder.path / member.name / "model"
        try:
            return read_trained_model(folder)
        except CorruptCheckpoint as damage:
            raise TrainingFault(f"the trained model of a member is damaged: {damage}") from None

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


def _scores(predictions: Predictions, calibration: Calibrated | None) -> dict[str, Any] | None:
    metrics = predictions.metrics()
    if metrics is None or calibration is None:
        return metrics
    after = replace(predictions, probabilities=calibrated(calibration, predictions.probabilities))
    return metrics | {"calibrated": after.metrics()}


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
