"""Resume: open and lock the run folder, find the newest sound checkpoint, and check that this job may continue it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import yaml

from dist_train.config.compatibility import as_begun, differences, migrated, redefined_metrics
from dist_train.config.load import config_to_yaml
from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.slurm import Attempt
from dist_train.errors import UserError, os_errors_as_faults
from dist_train.run.checkpoint.checkpoints import Checkpoints, Found
from dist_train.run.checkpoint.commit import CorruptCheckpoint, is_whole, remove, remove_stale
from dist_train.run.checkpoint.lock import RunLock, this_process
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import pack_json_line
from dist_train.run.checkpoint.trained_model import DESCRIPTION, read_trained_model
from dist_train.run.tracking.console_tracker import describe_scores
from dist_train.system.console import log
from dist_train.system.files import write_atomically
from dist_train.system.machine import describe_machine
from dist_train.tasks.base import NamesPretrained, Task
from dist_train.tasks.registry import description_in, load_task
from dist_train.training.progress import Progress, migrated_progress
from dist_train.training.selection import Selection

_LEAVING_SECONDS = 10.0  # from a collective that timed out to the end of the process

# Compatible keys that nevertheless change learning rates, lines of metrics, or which weights are the best.
_CHANGES_THE_RECORD = (
    "train.epochs", "train.max_steps", "train.early_stopping_patience", "train.select_by", "evaluation.", "log.",
)  # fmt: skip


def finished_line(
    folder: RunFolder, config: JobConfig, checkpoints: Checkpoints, *, total_steps: int, data_sha256: str
) -> str | None:
    """Rank 0: what to tell the user where this configuration has nothing left to train; None where it has.

    Only reads, and needs no lock. Raises UserError where the run is finished but of another configuration or data.
    """
    if config.run.resume == "never" or not (folder.summary.is_file() and is_whole(folder.model)):
        return None
    found, _ = checkpoints.newest()
    if found is None:
        return None
    progress = Progress(Selection.of(config.train))
    progress.load_state_dict(found.parts["state.json"]["progress"])
    if progress.trains_on(total_steps, config.train.early_stopping_patience):
        return None
    _refuse_changes(found, config)
    _refuse_other_data(found, config, data_sha256)
    try:
        test = json.loads(folder.summary.read_bytes())["test"]
    except (ValueError, KeyError, TypeError):
        return None  # a damaged summary is written again
    scores = f"test {describe_scores(test)}" if test else "there are no test rows"
    return (
        f"{folder.path}: the run is finished after {progress.step} steps: {scores}. Nothing is left to do: "
        f"continue with a larger {_limit(config, progress)}, or start anew with run.resume=never"
    )


def _limit(config: JobConfig, progress: Progress) -> str:
    """The key that ended a run, with its value."""
    train = config.train
    if progress.out_of_patience(train.early_stopping_patience):
        return f"train.early_stopping_patience (now {train.early_stopping_patience})"
    if train.max_steps is not None and progress.step >= train.max_steps:
        return f"train.max_steps (now {train.max_steps})"
    return f"train.epochs (now {train.epochs})"


def as_it_began(folder: RunFolder, config: JobConfig) -> JobConfig:
    """Rank 0: the configuration, with what an earlier version did where the run in the folder was begun by one."""
    if config.run.resume == "never":
        return config
    try:
        begun = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # there is no run, or it is refused later on
        return config
    if not isinstance(begun, dict) or not all(isinstance(values, dict) for values in begun.values()):
        return config
    config, changed = as_begun(config, begun)
    if changed:
        log.info("%s was begun by an earlier version: it goes on with %s", folder.path, ", ".join(changed))
    return config


def open_run(
    folder: RunFolder,
    config: JobConfig,
    checkpoints: Checkpoints,
    stack: ExitStack,
    environ: Mapping[str, str],
    collectives: Collectives,
) -> Found | None:
    """Rank 0 creates and locks the run folder; the checkpoint to continue from, if any, on every rank.

    Raises:
        UserError: another job holds the folder, or the checkpoint is of another configuration or cannot be used.
        Stopped: the ranks have agreed to stop while rank 0 waited for the lock.
    """
    lock = _locked(folder, config, stack, environ, collectives)
    found = collectives.kept_on_rank_zero(
        lambda: os_errors_as_faults(
            lambda: _open_folder(folder, config, checkpoints, stack, lock, environ), "the run folder"
        )
    )
    return _shared(found, collectives)


def _shared(found: Found | None, collectives: Collectives) -> Found | None:
    """On every rank what rank 0 has found; a tensor comes when it is asked for, which all ranks do together."""
    described = collectives.on_rank_zero(
        lambda: None if found is None else (found.without_tensors(), list(found.parts))
    )
    if described is None:
        return None
    without, names = described
    parts = {
        name: without.parts[name]
        if name in without.parts
        else collectives.tensors_of_rank_zero(found.parts[name] if found else None)
        for name in names
    }
    return Found(without.step, parts)


def open_ensemble(
    folder: RunFolder, config: JobConfig, stack: ExitStack, environ: Mapping[str, str], collectives: Collectives
) -> None:
    """Rank 0 creates and locks the folder of an ensemble, and writes its configuration. Raises as `open_run`."""
    lock = _locked(folder, config, stack, environ, collectives)
    unforced = replace(config, run=replace(config.run, force=False))

    def begin() -> None:
        remove_stale(folder.path)
        attempt = Attempt.from_environment(environ)
        restart = attempt is not None and attempt.restart > 0 and lock.former.get("job") == attempt.job
        if config.run.resume == "never" and not restart:
            _move_aside(folder, lock, stack, environ)
        if folder.checkpoints.is_dir():
            raise UserError(
                f"{folder.path}: holds a single run: choose another run.name for the ensemble, or start anew with "
                "run.resume=never"
            )
        folder.requeue.unlink(missing_ok=True)
        write_atomically(folder.config, config_to_yaml(unforced).encode())

    collectives.on_rank_zero(lambda: os_errors_as_faults(begin, "the run folder"))


def _locked(
    folder: RunFolder, config: JobConfig, stack: ExitStack, environ: Mapping[str, str], collectives: Collectives
) -> RunLock:
    own_patience_seconds = config.runtime.timeout_seconds + _LEAVING_SECONDS
    lock = RunLock(folder.lock, this_process(environ), own_patience_seconds=own_patience_seconds)
    collectives.on_rank_zero(folder.create)
    lock.take_on_rank_zero(collectives, "the run folder")
    stack.callback(lock.release)
    folder.held = lock
    return lock


def _move_aside(folder: RunFolder, lock: RunLock, stack: ExitStack, environ: Mapping[str, str]) -> None:
    former = folder.move_aside()
    if former:
        log.info("the run that was in %s is now in %s", folder.path, former)
        lock.release()
        folder.create()
        folder.held = stack.enter_context(RunLock(folder.lock, this_process(environ)))


def _open_folder(
    folder: RunFolder,
    config: JobConfig,
    checkpoints: Checkpoints,
    stack: ExitStack,
    lock: RunLock,
    environ: Mapping[str, str],
) -> Found | None:
    remove_stale(folder.path)
    remove_stale(folder.checkpoints)
    found, skipped = checkpoints.newest()
    if config.run.resume == "never" and not _is_restart(checkpoints, found, lock, environ):
        _move_aside(folder, lock, stack, environ)
        found, skipped = None, []
    if not found and any(folder.path.glob(f"*/{folder.config.name}")):
        raise UserError(
            f"{folder.path}: holds an ensemble: choose another run.name for a single run, or start anew with "
            "run.resume=never"
        )
    for reason in skipped:
        log.warning("skipped a damaged checkpoint: %s", reason)
    if skipped and not found:
        raise UserError(
            f"{folder.checkpoints}: no checkpoint verifies ({skipped[0]}); "
            "run.resume=never starts anew and keeps them aside"
        )
    if found:
        _refuse_changes(found, config)
        _log_changes(found, config)
        _check_best(found, config, checkpoints)
    return found


def _is_restart(checkpoints: Checkpoints, found: Found | None, lock: RunLock, environ: Mapping[str, str]) -> bool:
    """Whether this is a restart of the job that began the run: `never` starts anew once, not at each restart.

    A run without a checkpoint was begun by the last holder of its lock.
    """
    attempt = Attempt.from_environment(environ)
    if attempt is None or attempt.restart == 0:
        return False
    if found:
        return bool(found.parts["state.json"].get("job") == attempt.job)
    return not checkpoints.steps() and lock.former.get("job") == attempt.job


def begin_writing(
    folder: RunFolder, config: JobConfig, checkpoints: Checkpoints, step: int, *, trains_on: bool, changes: list[str]
) -> None:
    """Rank 0 writes to the run folder for the first time; a refusal before this call has left the folder as it was.

    `trains_on`: there are steps to come, so the trained model of a shorter run is removed. `changes` are appended to
    `changes.jsonl`, which `verify` reads.
    """
    unforced = replace(config, run=replace(config.run, force=False))  # run.force holds for one start

    def write() -> None:
        checkpoints.drop_after(step)
        folder.requeue.unlink(missing_ok=True)
        write_atomically(folder.config, config_to_yaml(unforced).encode())
        known = folder.changes.read_bytes() if step and folder.changes.is_file() else b""
        if changes:
            known += pack_json_line({"step": step, "changes": changes})
        if known:
            write_atomically(folder.changes, known)
        else:
            folder.changes.unlink(missing_ok=True)
        if trains_on:
            remove_exported(folder, checkpoints)

    os_errors_as_faults(write, "the run folder")


def changes_since(found: Found | None, config: JobConfig, task: Task, collectives: Collectives) -> list[str]:
    """Changes since the checkpoint that make a replay from before it differ: `verify` starts after them."""
    if not found:
        return []
    state = found.parts["state.json"]
    incompatible, compatible = differences(state["config"], _as_json(config))
    changes = incompatible + [line for line in compatible if line.startswith(_CHANGES_THE_RECORD)]
    if state["data_sha256"] != task.fingerprint:
        changes.append(f"the data: SHA-256 was {state['data_sha256']}, is {task.fingerprint}")
    regrouped = _regrouped(config, state, collectives)
    if regrouped:
        changes.append(regrouped)
    redefined = redefined_metrics(state.get("format", 1), len(task.class_names))
    changes += [f"the metric {name}: {words}" for name, words in redefined.items()]
    return changes


def _regrouped(config: JobConfig, state: Mapping[str, Any], collectives: Collectives) -> str | None:
    """How ranks or shards differ from those of a checkpoint, where the fast mode then sums gradients in another order.

    Ranks of one host add up in another way than those of several (`Collectives.all_reduce`); of two there is one order.
    """
    if config.train.virtual_ranks is not None:
        return None
    size, local_size = collectives.size, collectives.local_size
    was, was_local = state["world_size"], state.get("ranks_per_host", local_size)
    if was != size:
        return f"world size in the fast mode: was {was}, is {size}"
    was_fsdp = migrated(state["config"])["runtime"]["fsdp"]
    if size > 1 and was_fsdp != config.runtime.fsdp:
        return f"runtime.fsdp: was {was_fsdp}, is {config.runtime.fsdp}"
    if size > 2 and was_local != local_size:
        return f"ranks of a host in the fast mode: were {was_local}, are {local_size}"
    return None


def _as_json(config: JobConfig) -> Any:
    """A configuration as JSON gives it back: the keys of a mapping are text."""
    return json.loads(json.dumps(asdict(config)))


def remove_exported(folder: RunFolder, checkpoints: Checkpoints) -> None:
    """Remove the trained model and its summary, unless no sound checkpoint holds its weights."""
    if folder.model.is_dir():
        try:
            checkpoints.read(read_trained_model(folder.model)[DESCRIPTION]["step"])
        except (UserError, CorruptCheckpoint, KeyError) as error:
            log.warning(
                "%s stays as it is until training is over: its weights are nowhere else (%s)", folder.model, error
            )
            return
    folder.summary.unlink(missing_ok=True)
    if folder.model.is_dir():
        remove(folder.model)


def _refuse_changes(found: Found, config: JobConfig) -> None:
    incompatible, _ = differences(found.parts["state.json"]["config"], _as_json(config))
    if incompatible and not config.run.force:
        raise UserError(
            f"the checkpoint of step {found.step} was trained with another configuration: {'; '.join(incompatible)}. "
            "Set them back, choose another run.name, start anew with run.resume=never, or insist with run.force=true"
        )


def _log_changes(found: Found, config: JobConfig) -> None:
    incompatible, compatible = differences(found.parts["state.json"]["config"], _as_json(config))
    for line in compatible:
        log.info("changed since the checkpoint: %s", line)
    for line in incompatible:
        log.warning("forced to go on although %s", line)


def _check_best(found: Found, config: JobConfig, checkpoints: Checkpoints) -> None:
    """Check before training, not after it, that the best weights so far can be read."""
    progress = found.parts["state.json"]["progress"]
    best = progress["best_step"]
    if best is None or best == found.step:
        return
    try:
        checkpoints.read(best)
        return
    except UserError as error:
        # A newer best checkpoint that was skipped as damaged had let this one be removed; training finds it again.
        if best in checkpoints.steps() and not config.run.force:
            raise UserError(
                f"{error}. It holds the best weights so far: start anew with run.resume=never, "
                "or go on without it with run.force=true"
            ) from None
        log.warning("the best weights so far are lost, going on without them: %s", error)
    progress |= migrated_progress(progress) | {"best_step": None, "best_value": None}


def matching_task(found: Found | None, config: JobConfig, task: Task, collectives: Collectives) -> Task:
    """The task to go on with: preprocessing is that which the checkpoint's model was trained with.

    Raises:
        UserError: the data are others, or a pretrained model is another one by now.
    """
    if not found:
        return task
    state = found.parts["state.json"]
    if isinstance(task, NamesPretrained):
        task = task.as_trained(description_in(found.parts))
    if collectives.is_main:
        _note_other_bits(state, config, collectives)
    log.info("resuming from the checkpoint of step %d", found.step)
    if state["data_sha256"] == task.fingerprint:
        return task
    _refuse_other_data(found, config, task.fingerprint)
    log.warning("forced to go on although the data have changed")
    return load_task(config, collectives, description_in(found.parts))


def _refuse_other_data(found: Found, config: JobConfig, data_sha256: str) -> None:
    if found.parts["state.json"]["data_sha256"] != data_sha256 and not config.run.force:
        raise UserError(
            f"{config.data.path}: the file has changed since the checkpoint of step {found.step}; "
            "choose another run.name, start anew with run.resume=never, or insist with run.force=true"
        )


def _note_other_bits(state: Mapping[str, Any], config: JobConfig, collectives: Collectives) -> None:
    """Warn where the run cannot end in the bits of one that was never interrupted."""
    regrouped = _regrouped(config, state, collectives)
    if regrouped:
        log.warning("%s: results agree to rounding, not to the bit (train.virtual_ranks would make them)", regrouped)
    for name, value in describe_machine(collectives.device).items():
        if state["machine"].get(name, value) != value:  # an earlier release may not have asked
            log.warning(
                "%s is %s, the checkpoint was trained with %s: equal bits are not promised",
                name, value, state["machine"][name],
            )  # fmt: skip
