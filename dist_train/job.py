"""A configuration and a world become a run. `train` is the table of contents; each line of it is a room."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from dist_train.checkpoint.checkpoints import Checkpoints
from dist_train.checkpoint.commit import write_atomically
from dist_train.checkpoint.run_folder import RunFolder
from dist_train.checkpoint.state import pack_json
from dist_train.config.rules import given_class_weights
from dist_train.config.schema import JobConfig
from dist_train.errors import guarded
from dist_train.models.virtual_ranks import require_world_size
from dist_train.resuming import changes_since, matching_dataset, open_run, take_over
from dist_train.runtime.collectives import Collectives
from dist_train.runtime.console import log
from dist_train.runtime.machine import pin_arithmetic
from dist_train.runtime.stopping import StopFlag
from dist_train.runtime.world import World, process_group
from dist_train.session import Session, build_loop, load_data
from dist_train.shipping import checkpoint_parts, ship
from dist_train.tracking.books import Books
from dist_train.training.loop import Ending
from dist_train.training.parts import Record


def train(config: JobConfig, world: World, environ: Mapping[str, str], *, dry_run: bool = False) -> None:
    """Train a run to its end, to an agreed stop, or (`dry_run`) print its plan and write nothing."""
    if config.train.virtual_ranks:
        require_world_size(config.train.virtual_ranks, world.size)
        pin_arithmetic(world.device)
    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag().listening())
        stack.enter_context(process_group(world, config.runtime.timeout_seconds))
        collectives = Collectives(world)
        dataset = load_data(config, collectives)
        given_class_weights(config.train, dataset.encoder.class_names)
        session = Session(config, dataset, collectives)  # what it refuses is refused before anything is written
        if dry_run:
            _announce(session, world)
            return
        folder = RunFolder(Path(config.run.dir) / config.run.name)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        found = collectives.from_first(lambda: open_run(folder, config, checkpoints, stack, environ))
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
        _announce(session, world)
        books: list[Books] = []  # one on rank 0, none elsewhere

        def open_books() -> None:
            state = found.parts["state.json"] if found else None
            steps = {"total_steps": session.total_steps, "start_step": session.progress.step}
            books.append(stack.enter_context(Books(config, folder.metrics, **steps, state=state, environ=environ)))

        def save(step: int) -> None:
            def write() -> None:
                parts = checkpoint_parts(config, session, books[0].state_dict(), world)
                checkpoints.write(step, parts, session.progress.best_step)

            collectives.from_first(lambda: guarded(write, f"the checkpoint of step {step}"))

        def track(record: Record) -> None:
            collectives.from_first(lambda: books[0].track(record))

        collectives.from_first(lambda: guarded(open_books, "metrics.jsonl"))
        loop = build_loop(config, session, collectives, save=save, track=track, wants_stop=lambda: stop.raised)
        ending = loop.run()
        collectives.from_first(lambda: guarded(lambda: books[0].close(failed=False), "metrics.jsonl"))
        if ending is Ending.STOPPED:
            collectives.from_first(lambda: _mark_for_requeue(folder, session))
            return
        log.info("%s after %d steps", ending.value, session.progress.step)
        ship(config, session, collectives, folder, checkpoints, world)


def _announce(session: Session, world: World) -> None:
    for line in session.plan(world).lines():
        log.info("%s", line)


def _mark_for_requeue(folder: RunFolder, session: Session) -> None:
    step = session.progress.step
    guarded(lambda: write_atomically(folder.requeue, pack_json({"step": step})), "the requeue marker")
    log.info("stopped at step %d of %d: saved; the same command continues", step, session.total_steps)
