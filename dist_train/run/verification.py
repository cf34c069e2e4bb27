"""Replay a run from its checkpoints and compare: what a model validator does before believing a model."""

from __future__ import annotations

from dataclasses import asdict

from dist_train.config.schema import JobConfig
from dist_train.determinism.sliced_modules import require_world_size
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.run.chain import compare_chain
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import Parts
from dist_train.run.evidence import Evidence
from dist_train.run.replay import Replay, Report
from dist_train.run.session import Session
from dist_train.system.machine import describe_machine
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
    if last <= first:
        raise UserError(f"{folder.path}: nothing is recorded of the steps after {first} up to {last}")
    _check_world(config, evidence, collectives)
    report = Report(first, first, machine=describe_machine(collectives.device), config=asdict(config))
    compare_chain(evidence, config, first, last, report)
    if report.difference is not None:
        return report
    start = evidence.start(first, last)
    stored = Checkpoints(folder.checkpoints, keep=1)
    parts = collectives.on_rank_zero(lambda: stored.read(start)) if start in evidence.checkpoints else None
    session = _session(config, collectives, evidence, parts)
    report.first_step, report.last_step = start, last
    report.data_sha256 = session.task.fingerprint
    for change in evidence.changes:
        report.notes.append(f"changed at step {change['step']}: {'; '.join(change['changes'])}")
    _compare_machine(report, evidence, config)
    replay = Replay(evidence, session, report, collectives)
    replay.run(config)
    replay.compare_trained_model()
    if evidence.origin and evidence.origin["data_sha256"] != session.task.fingerprint:
        was = evidence.origin["data_sha256"]
        report.differ(last, f"the data are not those of the run: SHA-256 {session.task.fingerprint}, the run had {was}")
    return report


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
