"""Replay a run from its checkpoints and compare: what a model validator does before believing a model."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace

from dist_train.config import families
from dist_train.config.schema import JobConfig
from dist_train.determinism.sliced_modules import require_world_size
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import Parts
from dist_train.run.session import Session
from dist_train.run.verification.chain import compare_chain
from dist_train.run.verification.challenge import Challenge, Window, windows_between
from dist_train.run.verification.evidence import Evidence
from dist_train.run.verification.replay import Replay, Report
from dist_train.system.machine import describe_machine
from dist_train.tasks.base import NamesPretrained, Task
from dist_train.tasks.registry import description_in, load_task


def verify(
    folder: RunFolder, config: JobConfig, collectives: Collectives, first: int = 0, last: int | None = None
) -> Report:
    """Replay the steps after `first` up to `last` of a run; the same report on every rank.

    Every line of metrics and every checkpoint in that range is compared to the bit, and where the range holds the best
    step, the trained model and the metrics of the summary as well. The replay starts from the newest sound checkpoint
    at or before `first`, or from the initial weights. It begins only where the folder is that of its witness.jsonl.
    """
    evidence = collectives.on_rank_zero(lambda: Evidence.of(folder))
    last = evidence.last_step if last is None else min(last, evidence.last_step)
    report = _examined(folder, evidence, config, collectives, first, last)
    if report.difference is not None:
        return report
    start = evidence.start(first, last)
    report.first_step, report.last_step = start, last
    parts = _parts_at(start, folder, evidence, collectives)
    with closing(_session(config, collectives, evidence, parts)) as session:
        replay = Replay(evidence, session, report, collectives)
        replay.run(config)
        replay.compare_trained_model()
    _compare_data(evidence, session.task, last, report)
    return report


def challenge(folder: RunFolder, config: JobConfig, collectives: Collectives, count: int, seed: int | None) -> Report:
    """Replay `count` windows of a run, each from the checkpoint at its start; the same report on every rank.

    `seed` draws the windows; None: a random one. All of them are replayed, also after a difference.
    """
    challenged = ChallengedRun(folder, config, collectives)
    report = challenged.report
    if report.difference is None:
        report.challenge = Challenge.of(challenged.windows, count, seed_of_challenge(seed, collectives))
        report.challenge.differing += challenged.replay(report.challenge.drawn)
    return report


def seed_of_challenge(seed: int | None, collectives: Collectives) -> int:
    """The seed that was given, or a random one, the same on every rank."""
    return collectives.on_rank_zero(lambda: secrets.randbits(32) if seed is None else seed)


class ChallengedRun:
    """A run of which windows are replayed; `report` says what was found, first that the folder is that of its chain.

    A window ends where the next one begins: at a sound checkpoint. `windows` together have all steps, or those since
    the configuration was changed on the way. The states of checkpoints that were removed are compared with their lines
    of witness.jsonl.
    """

    def __init__(self, folder: RunFolder, config: JobConfig, collectives: Collectives) -> None:
        self._folder, self._config, self._collectives = folder, config, collectives
        self._evidence = evidence = collectives.on_rank_zero(lambda: Evidence.of(folder))
        self.report = _examined(folder, evidence, config, collectives, 0, evidence.last_step)

    @property
    def windows(self) -> list[Window]:
        """All that can be drawn. UserError: no sound checkpoint is left since the configuration was changed."""
        last = self._evidence.last_step
        return windows_between(self._evidence.starts(last), last)

    def replay(self, drawn: Sequence[Window]) -> list[Window]:
        """Replay windows, one or more; those that differ."""
        evidence, report, differing = self._evidence, self.report, []
        task: Task | None = None
        for window in drawn:
            parts = _parts_at(window[0], self._folder, evidence, self._collectives)
            of_window = Report(*window)
            with closing(_session(self._config, self._collectives, evidence, parts, task)) as session:
                task = session.task
                replay = Replay(evidence, session, of_window, self._collectives)
                replay.run(self._config)
                if window[0] < evidence.best_step <= window[1]:
                    replay.compare_trained_model()
            report.add(of_window)
            if of_window.difference is not None:
                differing.append(window)
        if evidence.summary and not report.model_compared and report.difference is None:
            report.notes.append(f"the trained model is of step {evidence.best_step}, outside of what was replayed")
        assert task is not None
        _compare_data(evidence, task, evidence.last_step, report)
        return differing


def _examined(
    folder: RunFolder, evidence: Evidence, config: JobConfig, collectives: Collectives, first: int, last: int
) -> Report:
    """A report of nothing replayed yet: machine, changes on the way, and what is not of the chain."""
    if last <= first:
        raise UserError(f"{folder.path}: nothing is recorded of the steps after {first} up to {last}")
    _check_world(config, evidence, collectives)
    report = Report(first, first, machine=describe_machine(collectives.device), config=asdict(config))
    for change in evidence.changes:
        report.notes.append(f"changed at step {change['step']}: {'; '.join(change['changes'])}")
    _compare_machine(report, evidence, config)
    compare_chain(evidence, config, first, last, report)
    return report


def _parts_at(start: int, folder: RunFolder, evidence: Evidence, collectives: Collectives) -> Parts | None:
    """The checkpoint that a replay starts from, on every rank; None: it starts from the initial weights."""
    stored = Checkpoints(folder.checkpoints, keep=1)
    return collectives.on_rank_zero(lambda: stored.read(start)) if start in evidence.checkpoints else None


def _compare_data(evidence: Evidence, task: Task, last: int, report: Report) -> None:
    report.data_sha256 = task.fingerprint
    if evidence.origin and evidence.origin["data_sha256"] != task.fingerprint:
        was = evidence.origin["data_sha256"]
        report.differ(last, f"the data are not those of the run: SHA-256 {task.fingerprint}, the run had {was}")


def _session(
    config: JobConfig, collectives: Collectives, evidence: Evidence, parts: Parts | None, task: Task | None = None
) -> Session:
    """The run as it stood. Preprocessing is fitted anew, unless the run went on with other data than it began with.

    `task` is that of an earlier session of the same run.
    """
    fitted = description_in(parts) if parts and evidence.changes else None
    # What the folder keeps of the data, as tokens, is made again.
    anew = replace(config, run=replace(config.run, resume="never"))
    task = task or load_task(anew, collectives, fitted)
    recorded = evidence.checkpoints[max(evidence.checkpoints)] if evidence.checkpoints else evidence.model
    if isinstance(task, NamesPretrained) and recorded:
        task = task.as_trained(description_in(recorded))
    session = Session(config, task, collectives)
    if parts:
        session.restore(parts)
    return session


def _check_world(config: JobConfig, evidence: Evidence, collectives: Collectives) -> None:
    if config.train.virtual_ranks:
        require_world_size(config.train.virtual_ranks, collectives.size)
        return
    origin = evidence.origin
    if origin and origin["world_size"] != collectives.size:
        # The exact mode does not shard a model.
        elsewhere = "" if config.runtime.fsdp else "; with train.virtual_ranks set, on any number"
        raise UserError(
            f"the run was trained in the fast mode on {origin['world_size']} ranks: its bits can be verified "
            f"on as many only{elsewhere}"
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


_PROCESSOR = ("processor", "instructions", "threads")


# Of their steps and scores every operation in float32 is defined; others have some of torch's, as LayerNorm or GELU.
_DEFINED_FAMILIES = ("financial_classifier", "tabm")


def _bits_are_defined(config: JobConfig, report: Report) -> bool:
    """Whether the run's bits are those of every processor."""
    exact, defined = config.train.virtual_ranks is not None, config.runtime.products == "defined"
    block = families.block_of(config.model)
    return (
        exact
        and defined
        and report.machine["device"] == "cpu"
        and config.model.name in _DEFINED_FAMILIES
        and getattr(block, "numeric_embedding", None) != "periodic"
        and (config.train.precision, config.train.loss) == ("float32", "cross_entropy")
    )
