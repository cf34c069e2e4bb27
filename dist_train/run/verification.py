"""Replay a run from its checkpoints and compare: what a model validator does before believing a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_train.config.compatibility import FORMATS, redefined_metrics
from dist_train.config.load import config_from_tree
from dist_train.config.schema import JobConfig
from dist_train.determinism.sliced_modules import require_world_size
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import CorruptCheckpoint
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import Parts, read_parts, tensor_sha256, weights_sha256, with_digests
from dist_train.run.checkpoint.trained_model import (
    CALIBRATION,
    DESCRIPTION,
    config_of_model,
    describe_model,
    read_trained_model,
)
from dist_train.run.scoring import score_splits
from dist_train.run.session import Session, build_loop, unsaved_weights
from dist_train.system.machine import describe_machine
from dist_train.tasks.registry import description_in, load_task
from dist_train.training.progress import migrated_progress
from dist_train.training.protocols import Record

# What a clock says, and what a run notes about itself: everything else must be equal.
_OF_THE_CLOCK = ("samples_per_second", "train_seconds")
_OF_THE_EVALUATION = ("best_value", "best_step", "evaluations_without_gain", "reductions", "evaluation_due")


@dataclass
class Report:
    """What a replay found. `difference` is None when everything agreed."""

    first_step: int
    last_step: int
    lines: int = 0
    checkpoints: int = 0
    model_compared: bool = False
    difference: str | None = None
    difference_step: int | None = None
    notes: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)
    data_sha256: str = ""
    weights_sha256: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def differ(self, step: int, what: str) -> None:
        """Note a difference; the first one of the earliest step counts."""
        if self.difference_step is None or step < self.difference_step:
            self.difference, self.difference_step = what, step


@dataclass
class Evidence:
    """What a run folder claims, read once: a run that goes on meanwhile may drop a checkpoint.

    Of the tensors in `checkpoints` and in `model` it holds digests: it is sent to every rank.
    """

    lines: list[dict[str, Any]]
    checkpoints: dict[int, Parts]
    damaged: dict[int, str]
    summary: dict[str, Any] | None
    model: Parts | None
    model_sha256: str
    model_damage: str | None
    changes: list[dict[str, Any]]

    @staticmethod
    def of(folder: RunFolder) -> Evidence:
        """Read a run folder; nothing in it is changed."""
        stored = Checkpoints(folder.checkpoints, keep=1)
        checkpoints, damaged = {}, {}
        for step in stored.steps():
            try:
                checkpoints[step] = with_digests(read_parts(stored.path(step)))
            except CorruptCheckpoint as damage:
                if stored.path(step).is_dir():
                    damaged[step] = str(damage)
        summary = _read_json(folder.summary) if folder.summary.is_file() else None
        model = model_damage = None
        model_sha256 = ""
        if summary:
            try:
                parts = read_trained_model(folder.model)
                model, model_sha256 = with_digests(parts), weights_sha256(parts["model.pth"])
            except CorruptCheckpoint as damage:
                model_damage = str(damage)
        changes = _read_lines(folder.changes) if folder.changes.is_file() else []
        lines = _read_lines(folder.metrics)
        return Evidence(lines, checkpoints, damaged, summary, model, model_sha256, model_damage, changes)

    @property
    def last_step(self) -> int:
        """The last step that anything is claimed of."""
        return max([line["step"] for line in self.lines] + list(self.checkpoints), default=0)

    @property
    def origin(self) -> dict[str, Any] | None:
        """What the run says of its machine and data: in its newest checkpoint, else in the summary."""
        if self.checkpoints:
            state: dict[str, Any] = self.checkpoints[max(self.checkpoints)]["state.json"]
            return state
        return self.summary

    @property
    def format(self) -> int:
        """Format number of the newest checkpoint, else of the trained model."""
        if self.checkpoints:
            return int(self.checkpoints[max(self.checkpoints)]["state.json"].get("format", 1))
        return int(self.model[DESCRIPTION]["format"]) if self.model else FORMATS["checkpoint"]

    def start(self, first: int, last: int) -> int:
        """Where a replay of the steps after `first` can begin: at a sound checkpoint, or at 0.

        A run whose configuration was changed on the way is replayed from the last change on.
        """
        change = max((c["step"] for c in self.changes if c["step"] < last), default=0)
        before = [step for step in self.checkpoints if change <= step <= max(first, change)]
        if before or not change:
            return max(before, default=0)
        after = [step for step in self.checkpoints if change <= step < last]
        if not after:
            raise UserError(
                f"the configuration was changed at step {change}, and no sound checkpoint from there on is left to "
                "replay from"
            )
        return min(after)


def verify(
    folder: RunFolder, config: JobConfig, collectives: Collectives, first: int = 0, last: int | None = None
) -> Report:
    """Replay the steps after `first` up to `last` of a run; the same report on every rank.

    Every line of metrics and every checkpoint in that range is compared to the bit, and where the range holds the best
    step, the trained model and the metrics of the summary as well. The replay starts from the newest sound checkpoint
    at or before `first`, or from the initial weights.
    """
    evidence = collectives.on_rank_zero(lambda: Evidence.of(folder))
    last = evidence.last_step if last is None else min(last, evidence.last_step)
    if last <= first:
        raise UserError(f"{folder.path}: nothing is recorded of the steps after {first} up to {last}")
    _check_world(config, evidence, collectives)
    start = evidence.start(first, last)
    stored = Checkpoints(folder.checkpoints, keep=1)
    parts = collectives.on_rank_zero(lambda: stored.read(start)) if start in evidence.checkpoints else None
    session = _session(config, collectives, evidence, parts)
    report = Report(start, last, machine=describe_machine(collectives.device), config=asdict(config))
    report.data_sha256 = session.task.fingerprint
    for change in evidence.changes:
        report.notes.append(f"changed at step {change['step']}: {'; '.join(change['changes'])}")
    _compare_machine(report, evidence, config)
    replay = _Replay(evidence, session, report, collectives)
    replay.run(config)
    replay.compare_trained_model()
    if evidence.origin and evidence.origin["data_sha256"] != session.task.fingerprint:
        was = evidence.origin["data_sha256"]
        report.differ(last, f"the data are not those of the run: SHA-256 {session.task.fingerprint}, the run had {was}")
    return report


class _Replay:
    """Listens to a training loop and compares what it says with what was recorded; alike on every rank."""

    def __init__(self, evidence: Evidence, session: Session, report: Report, collectives: Collectives) -> None:
        self.evidence = evidence
        self.session = session
        self.report = report
        self.collectives = collectives
        self.pending = [x for x in evidence.lines if report.first_step < x["step"] <= report.last_step]
        self.best_weights: dict[str, Tensor] | None = None

    def run(self, config: JobConfig) -> None:
        """Train over the range; ends at its last step, or early after a difference."""
        build_loop(
            config, self.session, self.collectives,
            save=lambda _step: None, track=self.compare_line, wants_stop=self.is_over,
            put_off=False,
        ).run()  # fmt: skip
        self.compare_step()
        if self.session.progress.step < self.report.last_step and self.report.difference is None:
            self.report.differ(self.session.progress.step + 1, "the replay has no such step: it ends before")
        for line in self.pending:
            if line["step"] <= self.session.progress.step:
                what = f"metrics.jsonl has a {line.get('split')} line that the replay has not"
                self.report.differ(line["step"], what)

    def is_over(self) -> bool:
        """Asked before each step: is it the last one? Everything of the step before has been done by then."""
        self.compare_step()
        step, difference = self.session.progress.step, self.report.difference_step
        return step + 1 >= self.report.last_step or (difference is not None and step >= difference)

    def compare_line(self, record: Record) -> None:
        """A line of metrics."""
        step, split = record["step"], record["split"]
        line = next((x for x in self.pending if (x["step"], x.get("split")) == (step, split)), None)
        if line is None:
            if self.report.first_step < step <= self.report.last_step:
                self.report.differ(step, f"metrics.jsonl has no {split} line of this step")
            return
        self.pending.remove(line)
        self.report.lines += 1
        name = first_difference(line, json.loads(json.dumps(record)), self._redefined(self.evidence.format))
        if name:
            what = f"{split} {name}: recorded {line.get(name)!r}, replayed {record.get(name)!r}"
            self.report.differ(step, what)

    def compare_step(self) -> None:
        """The checkpoint of the step where the replay stands, where the run has kept one."""
        step = self.session.progress.step
        summary = self.evidence.summary
        if summary and step == (summary["best_step"] or summary["steps"]):
            self.best_weights = {n: t.detach().clone() for n, t in self.session.scored.state_dict().items()}
        if not self.report.first_step < step <= self.report.last_step:
            return
        damage = self.evidence.damaged.pop(step, None)
        if damage:
            self.report.differ(step, f"the checkpoint does not verify: {damage}")
        recorded = self.evidence.checkpoints.pop(step, None)
        if recorded is None:
            return
        self.report.checkpoints += 1
        replayed = self.session.tensor_parts()
        name = first_different_tensor(recorded, replayed)
        state = recorded["state.json"]
        if name:
            self.report.differ(step, f"the checkpoint's {name} is not what the replay has")
        elif not self._same_task(recorded):
            self.report.differ(step, "the checkpoint's task (fitted preprocessing) is not what the replay has")
        else:
            recorded_progress = migrated_progress(state["progress"])
            replayed_progress = self.session.progress.state_dict()
            if recorded_progress["evaluation_due"]:  # stopped before an evaluation that the replay has done by now
                replayed_progress |= {name: recorded_progress[name] for name in _OF_THE_EVALUATION}
            name = first_difference(recorded_progress, replayed_progress)
            if name:
                self.report.differ(step, f"the checkpoint's {name} is not what the replay has")

    def compare_trained_model(self) -> None:
        """The trained model, its encoder, and the metrics that the summary claims for them."""
        report, summary = self.report, self.evidence.summary
        if summary is None:
            report.notes.append("the run is not finished: there is no trained model to compare yet")
            return
        if report.difference is not None:
            return
        best = summary["best_step"] or summary["steps"]
        if self.best_weights is None:
            report.notes.append(f"the trained model is of step {best}, outside of what was replayed")
            return
        if self.evidence.model is None:
            report.differ(best, f"the trained model does not verify: {self.evidence.model_damage}")
            return
        report.model_compared = True
        unsaved = unsaved_weights(self.session.scored)
        report.weights_sha256 = self.evidence.model_sha256
        if unsaved:  # what is kept of the model is compared below, tensor by tensor
            report.weights_sha256 = weights_sha256({**self.best_weights, **unsaved})
        replayed: Parts = {"model.pth": self.best_weights}
        name = first_different_tensor(self.evidence.model, replayed)
        if name:
            report.differ(best, f"the trained model's {name} is not what the replay has")
        if not self._same_task(self.evidence.model):
            report.differ(best, "the trained model's task (fitted preprocessing) is not what the replay has")
        described = describe_model(self.session.config, self.session.task.class_names)
        expected = config_from_tree(described["config"], "config.yaml")
        if config_of_model(self.evidence.model, DESCRIPTION) != expected:
            report.differ(best, f"the trained model's {DESCRIPTION} is not of the run's configuration")
        if report.weights_sha256 != summary["weights_sha256"]:
            report.differ(best, "model/model.pth does not have the weights_sha256 of summary.json")
        self.session.scored.load_state_dict(self.best_weights)
        scores, calibration = score_splits(
            self.session.scored, self.session.task, self.session.config, self.collectives
        )
        if self.evidence.model.get(CALIBRATION) != json.loads(json.dumps(calibration)):
            report.differ(best, f"the trained model's {CALIBRATION} is not what the replay has")
        for split, score in scores.items():
            redefined = self._redefined(self.evidence.model[DESCRIPTION]["format"])
            name = first_difference(summary[split] or {}, json.loads(json.dumps(score)) or {}, redefined)
            if name:
                report.differ(best, f"the summary's {split} {name} is not what the replayed weights have")

    def _redefined(self, number: int) -> dict[str, str]:
        """Metrics that cannot be compared with those of artefacts of this format; the report says so, once."""
        redefined = redefined_metrics(number, len(self.session.task.class_names))
        for name, words in redefined.items():
            note = f"{name} is not compared: its definition has changed since the run was trained; {words}"
            if note not in self.report.notes:
                self.report.notes.append(note)
        return redefined

    def _same_task(self, parts: Parts) -> bool:
        """Whether the task in a checkpoint or in `model/` is that of the replay; its format may be an older one."""
        return self.session.task.matches(description_in(parts))


def _session(config: JobConfig, collectives: Collectives, evidence: Evidence, parts: Parts | None) -> Session:
    """The run as it stood. Preprocessing is fitted anew, unless the run went on with other data than it began with."""
    fitted = description_in(parts) if parts and evidence.changes else None
    session = Session(config, load_task(config, collectives, fitted), collectives)
    if parts:
        session.restore(parts)
    return session


def _check_world(config: JobConfig, evidence: Evidence, collectives: Collectives) -> None:
    if config.train.virtual_ranks:
        require_world_size(config.train.virtual_ranks, collectives.size)
        return
    if config.runtime.fsdp and collectives.size > 1:
        raise UserError("runtime.fsdp: a run that was sharded over several ranks is not replayed, nor verified")
    origin = evidence.origin
    if origin and origin["world_size"] != collectives.size:
        raise UserError(
            f"the run was trained in the fast mode on {origin['world_size']} ranks: its bits can be verified "
            "on as many only; with train.virtual_ranks set, on any number"
        )


def _compare_machine(report: Report, evidence: Evidence, config: JobConfig) -> None:
    if evidence.origin is None:
        report.notes.append("the run has not said on which machine and data it was trained")
        return
    report.trained_on = evidence.origin["machine"]
    same_bits = _PROCESSOR if _bits_are_defined(config, report) else ()
    for name, value in report.trained_on.items():
        if report.machine.get(name) != value and name not in same_bits:
            now = report.machine.get(name, "nothing")
            report.notes.append(f"{name} is {now}, the run had {value}: equal bits are not promised")


_PROCESSOR = ("processor", "instructions")


def _bits_are_defined(config: JobConfig, report: Report) -> bool:
    """Whether the run's bits are those of every processor that has one of the two kinds of instructions."""
    kinds = {machine.get("instructions") for machine in (report.machine, report.trained_on)}
    return bool(config.train.virtual_ranks) and config.runtime.products == "defined" and kinds <= {"AVX2", "AVX512"}


def first_difference(
    recorded: Mapping[str, Any], replayed: Mapping[str, Any], redefined: Mapping[str, str] | None = None
) -> str | None:
    for name in [*replayed, *recorded]:
        if name not in _OF_THE_CLOCK and name not in (redefined or {}) and recorded.get(name) != replayed.get(name):
            return name
    return None


def first_different_tensor(recorded: Parts, replayed: Parts) -> str | None:
    """Part and name of a tensor that only one has, or that differs; `recorded` comes of `with_digests`."""
    for part, tensors in replayed.items():
        theirs: Mapping[str, str] = recorded.get(part, {})
        for name in [*tensors, *theirs]:
            if name not in theirs or name not in tensors or theirs[name] != tensor_sha256(tensors[name]):
                return f"{part}, tensor {name}"
    return None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            known = isinstance(record["step"], int)
        except (ValueError, KeyError, TypeError):
            known = False
        if known:
            records.append(record)
        elif number < len(lines):  # the last line may be one that is just being written
            raise UserError(f"{file}, line {number}: is not a line of a run")
    return records


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"{file}: cannot be read") from None
    return content
