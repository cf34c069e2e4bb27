"""Many files become a store: read `Preparation.run` to see the order of things.

Everything is made in a folder beside the store, `.partial-<name>`, where each piece is kept as soon as it is whole: the
same command continues after a kill. At the end the manifest is written and the store gets its name by one rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dist_train.accel.host_memory import use_host_memory
from dist_train.config.rules import split_seed
from dist_train.config.schema import JobConfig
from dist_train.data.splits.split import SPLITS
from dist_train.data.stores.batches import InFiles
from dist_train.data.stores.blocks import Blocks, Records
from dist_train.data.stores.prepare import Fitted, encode_blocks, fit
from dist_train.data.stores.spool import Spool, read_facts, rows_file, spool_unit
from dist_train.data.stores.store import (
    MANIFEST,
    Settings,
    Store,
    TensorFile,
    manifest_content,
    num_blocks,
    pack_manifest,
    tensor_files,
)
from dist_train.data.tables.columns import Columns, Unit, UnitFacts, check_classes, kinds_of, units_to_read_again
from dist_train.data.tables.inputs import find_files, plan_columns, plan_units
from dist_train.data.tables.table import ColumnKinds
from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.stopping import Launcher, StopRequest
from dist_train.distributed.supervision import watched
from dist_train.distributed.world import World, process_group
from dist_train.errors import Stopped, UserError, os_errors_as_faults
from dist_train.run.checkpoint.lock import RunLock, this_process
from dist_train.system.console import log
from dist_train.system.files import TMP_PREFIX, sync_folder, write_atomically, write_synced
from dist_train.system.progress_bar import progress_bar


def prepare(
    patterns: Sequence[str],
    output: Path,
    config: JobConfig,
    world: World,
    environ: Mapping[str, str],
    *,
    launcher: Launcher | None = None,
) -> None:
    """Make a store of the files of `patterns`, or go on with one that was interrupted; returns early when stopped."""
    stop = StopRequest(launcher=launcher)
    timeout = config.runtime.timeout_seconds
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        store = stack.enter_context(process_group(world, timeout))
        collectives = use_host_memory(Collectives(world, stop.wanted))
        preparation = Preparation(patterns, output, config, collectives, stack)
        with watched(collectives, store, timeout_seconds=timeout, report_file=None, launcher=launcher):
            try:
                preparation.run(this_process(environ))
            except UserError:
                collectives.on_rank_zero(preparation.clear_if_empty)
                raise
            except Stopped:
                log.info("stopped: what was done is kept in %s; the same command continues", preparation.folder)


def verify_store(folder: Path, world: World, timeout_seconds: float) -> Store:
    """Check every block of a store; UserError names one that is damaged."""
    with process_group(world, timeout_seconds) as shared:
        collectives = use_host_memory(Collectives(world))
        with watched(collectives, shared, timeout_seconds=timeout_seconds, report_file=None):
            store = collectives.run_on_all(lambda: Store(folder))
            with progress_bar("verifying", store.bytes_of(SPLITS), "bytes", shown=collectives.is_main) as show:
                store.verify(SPLITS, collectives, show)
    return store


class Preparation:
    """One command's work on a store."""

    def __init__(
        self, patterns: Sequence[str], output: Path, config: JobConfig, collectives: Collectives, stack: ExitStack
    ) -> None:
        self.output = output
        self.folder = output.with_name(TMP_PREFIX + output.name)
        self.settings = Settings.of(config.data, seed=split_seed(config))
        self._patterns = patterns
        self._config = config
        self._collectives = collectives
        self._stack = stack
        self._locked = False

    def run(self, holder: Mapping[str, Any]) -> None:
        """Make the store; raises Stopped when all ranks have agreed to stop."""
        collectives, heartbeat = self._collectives, self._collectives.heartbeat
        with heartbeat.phase("looking at the inputs"):
            files, columns, units = collectives.on_rank_zero(self._plan)
            lock = self._open(holder, {"files": files, "columns": asdict(columns), "settings": asdict(self.settings)})
        with heartbeat.phase("reading the data"):
            found, kinds = self._read(units, columns)
        class_names = check_classes(found, columns.target)
        batches = InFiles([rows_file(self._spool, unit) for unit, _ in found])
        spool = Spool(batches, found, kinds, class_names, weighted=columns.weight is not None)
        with heartbeat.phase("encoder fitting"):
            fitted = self._fitted(spool, class_names)
        with heartbeat.phase("encoding the data"):
            done = self._encode(spool, fitted)
        collectives.on_rank_zero(
            lambda: os_errors_as_faults(lambda: self._commit(fitted, done, units, lock), str(self.output))
        )

    def clear_if_empty(self) -> None:
        """Leave nothing behind, unless something in it saves the next command work."""
        if self._locked and self.folder.is_dir() and not any(self._spool.glob("*.json")):
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _spool(self) -> Path:
        return self.folder / "spool"

    @property
    def _store(self) -> Path:
        return self.folder / "store"

    @property
    def _fit_file(self) -> Path:
        return self.folder / "fit.json"

    @property
    def _records(self) -> Path:
        return self.folder / "blocks"

    def _plan(self) -> tuple[list[str], Columns, list[Unit]]:
        if self.output.exists():
            if not self._store.exists():  # killed after the rename, before everything else was cleared away
                shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(f"{self.output}: exists already: remove it, or choose another name for the new store")
        if self._config.data.folds is not None and self._config.data.fold is None:
            raise UserError("data.fold: a store holds one split: say which of the folds it is prepared for")
        files = find_files(self._patterns)
        return [str(file) for file in files], plan_columns(files, self._config.data), plan_units(files)

    def _open(self, holder: Mapping[str, Any], plan: Mapping[str, Any]) -> RunLock:
        """Rank 0 creates and locks the folder; UserError when it holds the beginnings of another store."""
        lock = RunLock(self.folder / "lock", holder, what="unfinished store")

        def create() -> None:
            self._spool.mkdir(parents=True, exist_ok=True)
            self._records.mkdir(exist_ok=True)
            self._store.mkdir(exist_ok=True)

        def begin() -> None:
            file = self.folder / "plan.json"
            if not file.is_file():
                write_atomically(file, json.dumps(plan).encode())
            elif json.loads(file.read_bytes()) != plan:
                raise UserError(
                    f"{self.folder}: holds an unfinished store of other files or of another configuration: remove it, "
                    "or choose another name for the new store"
                )
            else:
                log.info("going on with what is in %s", self.folder)

        self._collectives.on_rank_zero(lambda: os_errors_as_faults(create, str(self.folder)))
        lock.take_on_rank_zero(self._collectives, str(self.folder))
        self._stack.callback(lock.release)
        self._locked = True
        self._collectives.on_rank_zero(lambda: os_errors_as_faults(begin, str(self.folder)))
        return lock

    def _read(self, units: Sequence[Unit], columns: Columns) -> tuple[list[tuple[Unit, UnitFacts]], ColumnKinds]:
        """Every unit as it was read, now or by a former command; and what kind of column each one is."""
        former = self._collectives.on_rank_zero(lambda: {u.number: read_facts(self._spool, u) for u in units})
        facts = {number: of_unit for number, of_unit in former.items() if of_unit}
        if len(facts) < len(units):
            self._collectives.on_rank_zero(self._forget_fit)
        as_text: frozenset[str] = frozenset()
        asked, given = columns, columns.formats
        while True:
            facts |= self._read_units([unit for unit in units if unit.number not in facts], columns, as_text)
            found = [(unit, facts[unit.number]) for unit in units]
            if not any(of_unit.batches for _, of_unit in found):
                raise UserError(f"{', '.join(self._patterns)}: the table has no rows")
            kinds = kinds_of(found, asked)
            again = units_to_read_again(found, kinds)
            if not again:
                for remark in kinds.remarks if self._collectives.is_main else ():
                    log.info("%s", remark)
                return found, kinds
            # Text in one file makes a category of what another file holds as numbers; all files tell the form of texts.
            as_text = frozenset(kinds.categorical)
            columns = replace(columns, formats=given | {reading.column: reading.form for reading in kinds.readings})
            facts = {number: of_unit for number, of_unit in facts.items() if number not in again}

    def _read_units(self, units: Sequence[Unit], columns: Columns, as_text: frozenset[str]) -> dict[int, UnitFacts]:
        if not units:
            return {}
        own: dict[int, UnitFacts] = {}

        def read() -> Iterator[int]:
            for unit in units[self._collectives.rank :: self._collectives.size]:
                yield from spool_unit(unit, columns, self._spool, as_text)
                facts = read_facts(self._spool, unit)
                assert facts is not None, f"{unit.file} was read, and is not there"
                own[unit.number] = facts

        with progress_bar("reading", None, "rows", shown=self._collectives.is_main) as show:
            self._collectives.lockstep(on_disk(read()), show)
        return {
            number: facts
            for of_rank in self._collectives.all_gather_object(lambda: own)
            for number, facts in of_rank.items()
        }

    def _forget_fit(self) -> None:
        """What was fitted to other rows, and encoded, is of no use any more."""
        self._fit_file.unlink(missing_ok=True)
        for file in self._records.iterdir():
            file.unlink()

    def _fitted(self, spool: Spool, class_names: list[str]) -> Fitted:
        data, collectives = self._config.data, self._collectives

        def former() -> Any:
            return json.loads(self._fit_file.read_bytes()) if self._fit_file.is_file() else None

        packed = collectives.on_rank_zero(former)
        if packed is None:
            with progress_bar("fitting, in several passes", None, "rows", shown=collectives.is_main) as show:
                fitted = fit(
                    spool,
                    data,
                    class_names,
                    collectives,
                    seed=self.settings.seed,
                    show=show,
                )
            packed = fitted.pack()
            content = json.dumps(packed).encode()
            collectives.on_rank_zero(
                lambda: os_errors_as_faults(lambda: write_atomically(self._fit_file, content), str(self.folder))
            )
        return Fitted.unpack(packed)

    def _encode(self, spool: Spool, fitted: Fitted) -> Records:
        collectives = self._collectives
        records = Blocks(self._store, self._records, fitted)
        collectives.on_rank_zero(lambda: os_errors_as_faults(records.create, str(self.folder)))
        former = collectives.on_rank_zero(records.read)
        own = list(former.items())[collectives.rank :: collectives.size]
        sound: Records = {}
        with progress_bar("checking blocks that are there", len(former), "blocks", shown=collectives.is_main) as show:
            collectives.lockstep(records.check(own, sound), show)
        done = {
            block: sha for of_rank in collectives.all_gather_object(lambda: sound) for block, sha in of_rank.items()
        }
        wanted = {}
        for split in SPLITS:
            blocks = range(num_blocks(fitted.num_rows[split], fitted.block_rows))
            missing = [number for number in blocks if (split, number) not in done]
            begin, end = split_evenly(0, len(missing), collectives.size)[collectives.rank]
            wanted[split] = missing[begin:end]
        made: Records = {}
        with (
            progress_bar("encoding", spool.num_rows, "rows", shown=collectives.is_main) as show,
            records.writing(collectives.rank, made) as write,
        ):
            collectives.lockstep(on_disk(encode_blocks(spool, fitted, wanted, write)), show)
        for of_rank in collectives.all_gather_object(lambda: made):
            done |= of_rank
        return done

    def _commit(self, fitted: Fitted, done: Records, units: Sequence[Unit], lock: RunLock) -> None:
        files = {}
        for split in SPLITS:
            count = num_blocks(fitted.num_rows[split], fitted.block_rows)
            for name, (dtype, width) in tensor_files(fitted.spec, weighted=fitted.weighted).items():
                files[f"{split}.{name}"] = TensorFile(dtype, width, [done[split, n][name] for n in range(count)])
        inputs = {str(unit.file): {"file": str(unit.file), "bytes": unit.size} for unit in units}
        content = manifest_content(
            fitted.num_rows, fitted.block_rows, files, fitted.spec, self.settings, list(inputs.values())
        )
        write_synced(self._store / MANIFEST, pack_manifest(content))
        sync_folder(self._store)
        store = Store(self._store)
        lock.confirm()
        self._store.replace(self.output)
        sync_folder(self.output.parent)
        lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)
        rows = ", ".join(f"{name} {count:,}" for name, count in store.num_rows.items())
        log.info("%s: rows %s; %d features; data sha256 %s", self.output, rows, store.spec.num_columns, store.sha256)


def on_disk(work: Iterator[int]) -> Iterator[int]:
    """The same work; a disk that fails becomes a TrainingFault of one line."""
    while True:
        count = os_errors_as_faults(lambda: next(work, None), "the store")
        if count is None:
            return
        yield count
