"""A configuration and a world become a run. `Job.run` is the table of contents; each line of it is a room."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from dist_train.checkpoint.checkpoints import Checkpoints
from dist_train.checkpoint.run_folder import RunFolder
from dist_train.checkpoint.state import pack_json
from dist_train.config.rules import given_class_weights
from dist_train.config.run_folder import path_of_run
from dist_train.config.schema import JobConfig
from dist_train.errors import Stopped, guarded
from dist_train.models.virtual_ranks import require_world_size
from dist_train.resuming import changes_since, matching_dataset, open_run, take_over
from dist_train.runtime.attempt import Attempt
from dist_train.runtime.collectives import Collectives
from dist_train.runtime.console import log
from dist_train.runtime.files import write_atomically
from dist_train.runtime.machine import pin_arithmetic
from dist_train.runtime.stopping import LAUNCHER_DIED, Launcher, StopRequest
from dist_train.runtime.watch import LauncherDied, watched
from dist_train.runtime.world import World, process_group
from dist_train.session import Session, build_loop, load_data
from dist_train.shipping import checkpoint_parts, ship
from dist_train.tracking.books import Books
from dist_train.training.loop import Ending
from dist_train.training.parts import Record
from dist_train.training.plan import Plan
from dist_train.trial import Trial, try_out


def train(
    config: JobConfig,
    world: World,
    environ: Mapping[str, str],
    *,
    launcher: Launcher | None = None,
    dry_run: bool = False,
) -> None:
    """Train a run to its end, to an agreed stop, or (`dry_run`) print its plan, try it, and write nothing."""
    if config.train.virtual_ranks:
        require_world_size(config.train.virtual_ranks, world.size)
        pin_arithmetic(world.device)
    folder = RunFolder(path_of_run(config))
    attempt = Attempt.from_environment(environ)
    limit, timeout = config.run.time_limit_minutes, config.runtime.timeout_seconds
    stop = StopRequest(
        file=folder.stop if world.rank == 0 else None,
        attempt=attempt,
        time_limit_seconds=limit * 60 if limit else None,
        launcher=launcher,
    )
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        store = stack.enter_context(process_group(world, timeout))
        collectives = Collectives(world, stop.wanted)
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
                job.run(dry_run=dry_run)
            except Stopped:
                if not dry_run:
                    job.leave_marker(attempt)


class Job:
    """One job of a run. What it opens is closed with `stack`, which outlives the watch over the ranks."""

    def __init__(
        self,
        config: JobConfig,
        world: World,
        environ: Mapping[str, str],
        folder: RunFolder,
        collectives: Collectives,
        stop: StopRequest,
        stack: ExitStack,
    ) -> None:
        self.config = config
        self.world = world
        self.variables = environ
        self.folder = folder
        self.collectives = collectives
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, folder.confirm)
        self._stop = stop
        self._stack = stack

    def run(self, *, dry_run: bool) -> None:
        """Train to the end; raises Stopped when all ranks have agreed to stop, and everything is saved by then."""
        config, world, collectives, pulse = self.config, self.world, self.collectives, self.collectives.pulse
        folder, checkpoints = self.folder, self.checkpoints
        dataset = load_data(config, collectives)
        given_class_weights(config.train, dataset.encoder.class_names)
        session = Session(config, dataset, collectives)  # what it refuses is refused before anything is written
        if dry_run:
            _announce(session.plan(world))
            with pulse.phase("trial"):
                _announce(try_out(session, collectives, self._stop.wanted))
            return
        with pulse.phase("opening the run folder"):
            found = open_run(folder, config, checkpoints, self._stack, self.variables, collectives)
        matching = matching_dataset(found, config, dataset, collectives)
        if matching is not dataset:
            session = Session(config, matching, collectives)
        if found:
            session.restore(found.parts)
        step, trains_on = session.progress.step, session.trains_on
        changes = changes_since(found, config, matching, collectives)
        collectives.from_first(
            lambda: take_over(folder, config, checkpoints, step, trains_on=trains_on, changes=changes)
        )
        _announce(session.plan(world))
        books: list[Books] = []  # one on rank 0, none elsewhere

        def open_books() -> None:
            state = found.parts["state.json"] if found else None
            steps = {"total_steps": session.total_steps, "start_step": session.progress.step}
            opened = Books(config, folder.metrics, **steps, state=state, environ=self.variables)
            books.append(self._stack.enter_context(opened))

        def save(step: int) -> None:
            def write() -> None:
                folder.confirm()  # before the journal's own error, which would say less
                parts = checkpoint_parts(config, session, books[0].state_dict(), world, self.variables)
                checkpoints.write(step, parts, session.progress.best_step)

            collectives.from_first(lambda: guarded(write, f"the checkpoint of step {step}"))

        def track(record: Record) -> None:
            collectives.from_first(lambda: books[0].track(record))

        collectives.from_first(lambda: guarded(open_books, "metrics.jsonl"))
        loop = build_loop(config, session, collectives, save=save, track=track, wants_stop=self._stop.wanted)
        with pulse.phase("training"):
            ending = loop.run()
        collectives.from_first(lambda: guarded(lambda: books[0].close(failed=False), "metrics.jsonl"))
        if ending is Ending.STOPPED:
            raise Stopped
        log.info("%s after %d steps", ending.value, session.progress.step)
        with pulse.phase("shipping the model"):
            ship(config, session, collectives, folder, checkpoints, world)

    def leave_marker(self, attempt: Attempt | None) -> None:
        """Say in the run folder that the run was stopped on request, and can go on."""
        asked = dict.fromkeys(cause for cause in self.collectives.agree(self._cause) if cause)

        def write() -> int:
            step = max(self.checkpoints.steps(), default=0)
            said = {"step": step, "job": str(attempt) if attempt else None, "cause": ", ".join(asked)}
            if self.folder.held:
                self.folder.confirm()  # a run folder that has gone does not come back with a marker in it
            else:
                self.folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder.requeue, pack_json(said))
            self.folder.stop.unlink(missing_ok=True)
            log.info("stopped at step %d (%s): saved; the same command continues", step, said["cause"])
            return step

        step = self.collectives.from_first(lambda: guarded(write, "the requeue marker"))
        if LAUNCHER_DIED in asked:
            with self.collectives.pulse.phase("stopping", step):
                raise LauncherDied("torchrun has died: the run is saved; the same command continues")

    def _cause(self) -> str | None:
        self._stop.wanted()
        return self._stop.cause


def _announce(foretold: Plan | Trial) -> None:
    for line in foretold.lines():
        log.info("%s", line)
