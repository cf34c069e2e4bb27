"""Replay a run from its checkpoints and compare: what a model validator does before believing a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.checkpoint.checkpoints import Checkpoints, Found
from dist_train.checkpoint.commit import Damaged
from dist_train.checkpoint.run_folder import RunFolder
from dist_train.checkpoint.state import Parts, read_parts, weights_sha256
from dist_train.config.load import read_config
from dist_train.config.schema import JobConfig
from dist_train.data.encoder import Encoder
from dist_train.errors import UserError
from dist_train.models.virtual_ranks import require_world_size
from dist_train.runtime.collectives import Collectives
from dist_train.runtime.machine import describe_machine
from dist_train.session import Session, build_loop, load_data
from dist_train.training.parts import Record

_COMPARED = ("step", "epoch", "samples", "split", "loss")


@dataclass
class Report:
    """What a replay found. `difference` is None when everything agreed."""

    first_step: int
    last_step: int
    lines: int = 0
    checkpoints: int = 0
    difference: str | None = None
    difference_step: int | None = None
    notes: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    data_sha256: str = ""
    weights_sha256: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def differ(self, step: int, what: str) -> None:
        """Note a difference; the one of the earliest step counts."""
        if self.difference_step is None or step < self.difference_step:
            self.difference, self.difference_step = what, step


class Evidence:
    """What a run folder claims: its lines of metrics, its checkpoints, its weights. Nothing in it is changed."""

    def __init__(self, folder: RunFolder) -> None:
        if not folder.config.is_file():
            raise UserError(f"{folder.path}: is not a run folder (it has no config.yaml)")
        self.folder = folder
        self.checkpoints = Checkpoints(folder.checkpoints, keep=1)
        self.lines = list(_journal(folder.metrics))
        self.damaged: list[tuple[int, str]] = []
        self.states: dict[int, dict[str, Any]] = {}
        for step in self.checkpoints.steps():
            try:
                self.states[step] = read_parts(self.checkpoints.path(step))["state.json"]
            except Damaged as damage:
                self.damaged.append((step, str(damage)))

    @property
    def last_step(self) -> int:
        """The last step that anything is claimed of."""
        return max([line["step"] for line in self.lines] + list(self.states), default=0)

    def start(self, step: int) -> Found | None:
        """The newest sound checkpoint at or before a step; None: start from the initial weights."""
        usable = [s for s in self.states if s <= step]
        return Found(max(usable), self.checkpoints.read(max(usable))) if usable else None

    def origin(self) -> dict[str, Any] | None:
        """What the run says of its machine and data: from a checkpoint, else from the summary."""
        if self.states:
            return self.states[max(self.states)]
        if self.folder.summary.is_file():
            origin: dict[str, Any] = json.loads(self.folder.summary.read_text())
            return origin
        return None


def verify(run_folder: Path, collectives: Collectives, first: int = 0, last: int | None = None) -> Report:
    """Replay the steps after `first` up to `last` of a run; the same report on every rank.

    Every line of metrics and every checkpoint in that range is compared to the bit. The replay starts from the newest
    sound checkpoint at or before `first`, or from the initial weights.
    """
    evidence = collectives.from_first(lambda: Evidence(RunFolder(run_folder)))
    config = read_config(evidence.folder.config)
    last = evidence.last_step if last is None else min(last, evidence.last_step)
    if last <= first:
        raise UserError(f"{run_folder}: nothing is recorded of the steps after {first} up to {last}")
    _check_world(config, evidence, collectives)
    found = collectives.from_first(lambda: evidence.start(first)) if first else None
    session = _session(config, collectives, found)
    report = Report(session.progress.step, last, machine=describe_machine(collectives.device), config=asdict(config))
    _compare_origin(report, evidence, session)
    for step, damage in evidence.damaged:
        report.differ(step, f"the checkpoint does not verify: {damage}")
    replay = _Replay(evidence, session, report, collectives)
    replay.run(config)
    if collectives.is_first and last == evidence.last_step:
        _compare_shipped(report, evidence)
    return collectives.from_first(lambda: report)


class _Replay:
    """Listens to a training loop and compares what it says with what was recorded."""

    def __init__(self, evidence: Evidence, session: Session, report: Report, collectives: Collectives) -> None:
        self.evidence = evidence
        self.session = session
        self.report = report
        self.collectives = collectives
        self.pending = [x for x in evidence.lines if report.first_step < x["step"] <= report.last_step]

    def run(self, config: JobConfig) -> None:
        """Train over the range; ends at its last step, or early after a difference."""
        build_loop(
            config, self.session, self.collectives,
            save=self.compare_checkpoint, track=self.compare_line, wants_stop=self.is_over,
        ).run()  # fmt: skip
        for line in self.pending:
            self.report.differ(line["step"], f"metrics.jsonl has a line that the replay has not: {_short(line)}")

    def is_over(self) -> bool:
        """Asked before each step: is it the last one?"""
        step = self.session.progress.step
        difference = self.report.difference_step
        return step + 1 >= self.report.last_step or (difference is not None and step >= difference)

    def compare_line(self, record: Record) -> None:
        """A line of metrics, on every rank; rank 0's evidence is everybody's."""
        if record["step"] > self.report.last_step:
            return
        own = _short(json.loads(json.dumps(record)))
        same_place = [x for x in self.pending if (x["step"], x["split"]) == (record["step"], record["split"])]
        if not same_place:
            self.report.differ(record["step"], f"metrics.jsonl has no {record['split']} line of this step")
            return
        self.pending.remove(same_place[0])
        self.report.lines += 1
        for name in _COMPARED:
            if same_place[0].get(name) != own[name]:
                claimed = same_place[0].get(name)
                what = f"{record['split']} {name}: recorded {claimed!r}, replayed {own[name]!r}"
                self.report.differ(record["step"], what)

    def compare_checkpoint(self, step: int) -> None:
        """The tensors of a checkpoint, where the run has kept the one of this step."""
        if step not in self.evidence.states or not self.collectives.is_first:
            return
        recorded = self.evidence.checkpoints.read(step)
        self.report.checkpoints += 1
        name = _first_difference(recorded, self.session.tensor_parts())
        if name:
            self.report.differ(step, f"the checkpoint's {name} is not what the replay has")


def _session(config: JobConfig, collectives: Collectives, found: Found | None) -> Session:
    """The run as it stood; its own encoder, where there is a checkpoint, or one fitted anew."""
    encoder = None
    if found:
        encoder = Encoder.from_description(found.parts["state.json"]["encoder"], found.parts["encoder.pth"])
    session = Session(config, load_data(config, collectives, encoder), collectives)
    if found:
        session.restore(found.parts)
    return session


def _check_world(config: JobConfig, evidence: Evidence, collectives: Collectives) -> None:
    if config.train.virtual_ranks:
        require_world_size(config.train.virtual_ranks, collectives.size)
        return
    origin = evidence.origin()
    if origin and origin["world_size"] != collectives.size:
        raise UserError(
            f"the run was trained in the fast mode on {origin['world_size']} ranks: its bits can be verified "
            "on as many only; with train.virtual_ranks set, on any number"
        )


def _compare_origin(report: Report, evidence: Evidence, session: Session) -> None:
    report.data_sha256 = session.dataset.sha256
    origin = evidence.origin()
    if origin is None:
        report.notes.append("the run has not said on which machine and data it was trained")
        return
    for name, value in origin["machine"].items():
        if report.machine.get(name) != value:
            now = report.machine.get(name, "nothing")
            report.notes.append(f"{name} is {now}, the run had {value}: equal bits are not promised")
    if origin["data_sha256"] != session.dataset.sha256:
        report.notes.append(
            f"the data are not those of the run: SHA-256 {session.dataset.sha256}, the run had {origin['data_sha256']}"
        )


def _compare_shipped(report: Report, evidence: Evidence) -> None:
    """The weights in model/, the summary's hash, and the checkpoint that they come from belong together."""
    if not evidence.folder.summary.is_file():
        report.notes.append("the run is not finished: there is no summary yet")
        return
    summary = json.loads(evidence.folder.summary.read_text())
    step = summary["best_step"] or summary["steps"]
    try:
        parts = read_parts(evidence.folder.model)
    except Damaged as damage:
        report.differ(step, f"the trained model does not verify: {damage}")
        return
    report.weights_sha256 = weights_sha256(parts["model.pth"])
    if report.weights_sha256 != summary["weights_sha256"]:
        report.differ(step, "model/model.pth does not have the weights_sha256 of summary.json")


def _first_difference(recorded: Parts, replayed: Parts) -> str | None:
    for part, tensors in replayed.items():
        theirs: Mapping[str, Tensor] = recorded.get(part, {})
        for name, tensor in tensors.items():
            if name not in theirs or not _same_bits(theirs[name], tensor.cpu()):
                return f"{part}, tensor {name}"
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in _COMPARED}


def _journal(file: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            known = isinstance(record["step"], int) and isinstance(record["split"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if known:
            yield _short(record)
        elif number < len(lines):  # the last line may be one that is just being written
            raise UserError(f"{file}, line {number}: is not a line of metrics")
