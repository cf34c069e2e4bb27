"""A configuration and a world become a run. `Job.run` is the order of events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from dist_train.accel.host_memory import use_host_memory
from dist_train.config.auto import chosen_values
from dist_train.config.members import members_of
from dist_train.config.run_path import path_of_run
from dist_train.config.schema import JobConfig
from dist_train.determinism.sliced_modules import require_world_size
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.slurm import Attempt
from dist_train.distributed.stopping import LAUNCHER_DIED, Launcher, StopRequest
from dist_train.distributed.supervision import watched
from dist_train.distributed.world import World, process_group
from dist_train.errors import ComputationFault, LauncherDied, Stopped, os_errors_as_faults
from dist_train.risk.figures import require_matplotlib
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import pack_json, weights_sha256
from dist_train.run.checkpoint.witness import Witness, settings_line
from dist_train.run.dry_run import DryRunReport, profile_session
from dist_train.run.ensemble import Ensemble
from dist_train.run.export import checkpoint_parts, export_best
from dist_train.run.reporting import report_once
from dist_train.run.resume import as_it_began, begin_writing, changes_since, finished_line, matching_task, open_run
from dist_train.run.session import Session, build_loop, scored_weights
from dist_train.run.split_record import write_kept_files, write_split
from dist_train.run.tracking.trackers import NullTrackers, Trackers
from dist_train.system.console import log
from dist_train.system.files import with_path, write_atomically
from dist_train.system.machine import pin_arithmetic, use_deterministic_kernels
from dist_train.tasks.base import Task
from dist_train.tasks.registry import load_task
from dist_train.training.loop import Ending
from dist_train.training.plan import Plan
from dist_train.training.protocols import Save


def train(
    config: JobConfig,
    world: World,
    environ: Mapping[str, str],
    *,
    launcher: Launcher | None = None,
    dry_run: bool = False,
    handle_signals: bool = True,
) -> dict[str, Any] | None:
    """Train a run to its end and return its summary, the same on every rank.

    None where the ranks have agreed to stop, and where a `dry_run` has printed the plan, tried it, and written nothing.
    Signals ask a run to stop unless `handle_signals` is false.
    """
    if config.report.enabled:
        require_matplotlib()
    if config.train.virtual_ranks:
        require_world_size(config.train.virtual_ranks, world.size)
        pin_arithmetic(world.device)
    else:
        use_deterministic_kernels(world.device, strict=False)
    folder = RunFolder(path_of_run(config))
    attempt = Attempt.from_environment(environ)
    limit, timeout = config.run.time_limit_minutes, config.runtime.timeout_seconds
    stop = StopRequest(
        file=folder.stop if world.rank == 0 else None,
        attempt=attempt,
        holds_folder=lambda: folder.held is not None,
        time_limit_seconds=limit * 60 if limit else None,
        launcher=launcher,
    )
    with ExitStack() as stack:
        if handle_signals:
            stack.enter_context(stop.listening())
        store = stack.enter_context(process_group(world, timeout))
        collectives = use_host_memory(Collectives(world, stop.wanted))
        job = Job(config, world, environ, folder, collectives, stop, stack)
        title = f"{config.run.name}{f', job {attempt}' if attempt else ''}"
        with watched(
            collectives,
            store,
            timeout_seconds=timeout,
            report_file=None if dry_run else folder.fault,
            launcher=launcher,
            title=title,
        ):
            try:
                members = members_of(config)
                if members:
                    parts = (members, folder, collectives, environ, stack, job.train_member)
                    summary = Ensemble(config, *parts).run(world, dry_run=dry_run)
                else:
                    summary = job.run(dry_run=dry_run)
                if config.report.enabled and summary is not None:
                    report_once(folder, summary, collectives)
                return summary
            except Stopped:
                if not dry_run:
                    job.leave_marker(attempt)
    return None


class Job:
    """One job of a run. What it opens is closed with `stack`, which outlives the watch over the ranks.

    `before_writing` is called by all ranks when nothing is left that could refuse the run, before it writes.
    """

    def __init__(
        self,
        config: JobConfig,
        world: World,
        environ: Mapping[str, str],
        folder: RunFolder,
        collectives: Collectives,
        stop: StopRequest,
        stack: ExitStack,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.world = world
        self.variables = environ
        self.folder = folder
        self.collectives = collectives
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, folder.confirm)
        self._stop = stop
        self._stack = stack
        self._before_writing = before_writing
        self._written = self.checkpoints

    def train_member(
        self, config: JobConfig, *, before_writing: Callable[[], None], dry_run: bool
    ) -> dict[str, Any] | None:
        """Run another configuration, of a member of the ensemble that this job is, as a job of its own."""
        stack = self._stack.enter_context(ExitStack())  # open after a failure, until the watch over the ranks has ended
        folder = RunFolder(path_of_run(config))
        member = Job(config, self.world, self.variables, folder, self.collectives, self._stop, stack, before_writing)
        self._written = member.checkpoints
        summary = member.run(dry_run=dry_run)
        stack.close()
        return summary

    def run(self, *, dry_run: bool) -> dict[str, Any] | None:
        """Train to the end and return the summary; raises Stopped when all ranks have agreed to stop, saved by then."""
        config, world, collectives, heartbeat = self.config, self.world, self.collectives, self.collectives.heartbeat
        folder, checkpoints = self.folder, self.checkpoints
        config = collectives.on_rank_zero(lambda: as_it_began(folder, self.config))
        task = load_task(config, collectives)
        chosen = chosen_values(config, task.config)
        config = self.config = task.config
        session = self._session(task)  # what it refuses is refused before anything is written
        if dry_run:
            _announce(session.plan(world, chosen))
            with heartbeat.phase("dry run"):
                _announce(profile_session(session, collectives, self._stop.wanted))
            return None
        if self._already_finished(session):
            return collectives.on_rank_zero(lambda: dict(json.loads(folder.summary.read_bytes())))
        with heartbeat.phase("opening the run folder"):
            self._before_writing()
            found = open_run(folder, config, checkpoints, self._stack, self.variables, collectives)
        matching = matching_task(found, config, task, collectives)
        if matching is not task:
            session = self._session(matching)
        if found:
            session.restore(found.parts)
            found = found.without_tensors()  # they are in the session now
        step, trains_on = session.progress.step, session.trains_on
        changes = changes_since(found, config, matching, collectives)
        collectives.on_rank_zero(
            lambda: begin_writing(folder, config, checkpoints, step, trains_on=trains_on, changes=changes)
        )
        collectives.on_rank_zero(lambda: write_split(folder, config, session.task))
        collectives.on_rank_zero(lambda: write_kept_files(folder, session.task))
        _announce(session.plan(world, chosen))
        state = found.parts["state.json"] if found else None
        trackers = collectives.run_on_all(
            lambda: os_errors_as_faults(lambda: self._open_trackers(session, state), "metrics.jsonl")
        )

        witness = self._open_witness(session)
        save = self._saving(session, trackers, witness)
        loop = build_loop(config, session, collectives, save=save, track=trackers.track, wants_stop=self._stop.wanted)
        with heartbeat.phase("training"):
            try:
                ending = loop.run()
            except ComputationFault as fault:
                if collectives.is_main:
                    folder.add_to_report(f"{config.run.name}\n{fault}")
                raise
        collectives.run_on_all(lambda: os_errors_as_faults(trackers.end_training, "metrics.jsonl"))
        if ending is Ending.STOPPED:
            raise Stopped
        log.info("%s after %d steps", ending.value, session.progress.step)
        with heartbeat.phase("exporting the model"):
            summary = export_best(config, session, collectives, folder, checkpoints, world, witness.description())
            trackers.track_summary(summary)
        return summary

    def _open_trackers(self, session: Session, state: Mapping[str, Any] | None) -> Trackers | NullTrackers:
        if not self.collectives.is_main:
            return NullTrackers()
        trackers = Trackers(
            self.config,
            self.folder.metrics,
            total_steps=session.total_steps,
            start_step=session.progress.step,
            best_value=session.progress.best_value,
            selection=session.progress.selection,
            state=state,
            environ=self.variables,
        )
        return self._stack.enter_context(trackers)

    def _open_witness(self, session: Session) -> Witness:
        witness = Witness(self.folder.witness, self.folder.metrics)
        step, kept = session.progress.step, session.saves_here
        settings = settings_line(self.config, session.task.fingerprint, self.world.size)
        self.collectives.on_rank_zero(
            lambda: os_errors_as_faults(lambda: witness.begin(step, settings, kept=kept), "witness.jsonl")
        )
        return witness

    def _saving(self, session: Session, trackers: Trackers | NullTrackers, witness: Witness) -> Save:
        """What writes a checkpoint, and before it the line of the chain; called by all ranks."""

        def save(step: int) -> None:
            tensors = session.tensor_parts()

            def write() -> None:
                self.folder.confirm()  # before the trackers' own error, which would say less
                ended = trackers.state_dict()
                parts = checkpoint_parts(self.config, session, tensors, ended, self.world, self.variables)
                # A line without a checkpoint is cut off when the run goes on; a checkpoint without one would lack it.
                with with_path(self.checkpoints.path(step)):  # whose disk it is
                    witness.add(step, parts, weights_sha256(scored_weights(parts)), ended["metrics"]["bytes"])
                self.checkpoints.write(step, parts, session.progress.best_step)

            self.collectives.on_rank_zero(lambda: os_errors_as_faults(write, f"the checkpoint of step {step}"))

        return save

    def _already_finished(self, session: Session) -> bool:
        line = self.collectives.on_rank_zero(lambda: self._finished_line(session))
        if line:
            log.info("%s", line)
        return line is not None

    def _finished_line(self, session: Session) -> str | None:
        """`finished_line`; removes the marker that a job leaves which was stopped while it read the data."""
        line = finished_line(
            self.folder,
            self.config,
            self.checkpoints,
            total_steps=session.total_steps,
            data_sha256=session.task.fingerprint,
        )
        if line:
            with suppress(OSError):  # of a folder that cannot be written it is said all the same
                self.folder.requeue.unlink(missing_ok=True)
        return line

    def _session(self, task: Task) -> Session:
        session = Session(self.config, task, self.collectives)
        # Before the process group goes, also when an exception is on its way: NCCL waits for graphs that refer to it.
        self._stack.callback(session.close)
        return session

    def leave_marker(self, attempt: Attempt | None) -> None:
        """Write `requeue`: the run was stopped on request, and can go on.

        A job that has not locked the run folder writes nothing else there. The stop file is the holder's to remove.
        """
        causes = dict.fromkeys(cause for cause in self.collectives.all_gather_object(self._cause) if cause)

        def write() -> int:
            step = max(self._written.steps(), default=0)
            marker = {"step": step, "job": str(attempt) if attempt else None, "cause": ", ".join(causes)}
            if self.folder.held:
                self.folder.confirm()  # a run folder that was removed must not be made again for a marker
            else:
                self.folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder.requeue, pack_json(marker))
            if self.folder.held:
                self.folder.stop.unlink(missing_ok=True)
                log.info("stopped at step %d (%s): saved; the same command continues", step, marker["cause"])
            else:
                log.info("stopped before the run folder was opened (%s); the same command continues", marker["cause"])
            return step

        step = self.collectives.on_rank_zero(lambda: os_errors_as_faults(write, "the requeue marker"))
        if LAUNCHER_DIED in causes:
            with self.collectives.heartbeat.phase("stopping", step):
                raise LauncherDied("torchrun has died: the run is saved; the same command continues")

    def _cause(self) -> str | None:
        self._stop.wanted()
        return self._stop.cause


def _announce(report: Plan | DryRunReport) -> None:
    for line in report.lines():
        log.info("%s", line)
