"""`launch/prepare.py` as a user types it: a store trains like its files, mistakes cost a line, a kill nothing."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dist_train.data.stores.store import MANIFEST, Store
from dist_train.data.tables.table import locate, read_table
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from tests.cli.in_process import command, command_on_ranks, contents
from tests.cli.tables import QUICK, clients
from tests.cli.test_mistakes import assert_one_message
from tests.commands import REPOSITORY
from tests.data.stores import prepare_on_rank, table, write_parts
from tests.dist.sessions import train
from tests.patience import PATIENCE_SECONDS
from tests.ranks import _server, on_ranks

CREDIT_RISK = REPOSITORY / "configs" / "credit_risk.yaml"
SHORT = ("train.max_steps=80", "checkpoint.every_steps=30", "log.every_steps=20", "runtime.device=cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in data set, cut into files of both formats and prepared. Read only."""
    folder = tmp_path_factory.mktemp("credit")
    frame = read_table(locate("builtin:credit_card_risk"), [])
    files = write_parts(frame, folder / "files")
    outcome = command("prepare", *files, folder / "store", CREDIT_RISK)
    assert outcome.code == 0, outcome.err
    assert "rows train 17,979, valid 5,993, test 5,993" in outcome.err
    assert sorted(p.name for p in folder.iterdir()) == ["files", "store"]
    return folder / "store"


def record(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines of metrics and summary, without what a clock says and which data they are of."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    for entry in [*lines, summary]:
        for name in ("samples_per_second", "train_seconds", "peak_memory_bytes", "data_sha256", "run"):
            entry.pop(name, None)
    return lines, summary


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_store_trains_to_the_bits_of_the_file(mode: str, store: Path, tmp_path: Path) -> None:
    """Metrics, weights, resumption and verification."""
    more = () if mode == "fast" else ("train.virtual_ranks=4",)
    arguments = (CREDIT_RISK, *SHORT, *more, "wandb.mode=disabled", f"run.dir={tmp_path}")
    assert command("train", *arguments, "run.name=file").code == 0
    of_store = (*arguments, "run.name=store", f"data.path={store}")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "stop").touch()  # it stops at its first step, and goes on when it is told again
    stopped = command("train", *of_store)
    assert stopped.code == 0, stopped.err
    assert not (tmp_path / "store" / "summary.json").exists()
    assert command("train", *of_store).code == 0
    assert record(tmp_path / "store") == record(tmp_path / "file")
    verified = command("verify", tmp_path / "store")
    assert verified.code == 0, verified.err
    scored = [command("evaluate", tmp_path / name, "--split", "valid") for name in ("file", "store")]
    assert scored[0].out == scored[1].out != ""


def losses_and_weights(collectives: Collectives, arguments: list[str]) -> tuple[bytes, dict[str, bytes]]:
    trained = train(collectives, arguments)
    return trained.losses.tobytes(), {name: values.tobytes() for name, values in trained.weights.items()}


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_two_ranks_on_a_store_train_to_the_bits_of_two_ranks_on_the_file(mode: str, store: Path) -> None:
    more = [] if mode == "fast" else ["train.virtual_ranks=4"]
    arguments = [str(CREDIT_RISK), "train.max_steps=25", "runtime.device=cpu", "data.shuffle_block_rows=16", *more]
    file = on_ranks(2, losses_and_weights, arguments)
    stored = on_ranks(2, losses_and_weights, [*arguments, f"data.path={store}"])
    assert stored == file
    if mode == "exact":
        assert losses_and_weights(Collectives(World()), [*arguments, f"data.path={store}"]) == stored[0]


def test_on_two_ranks_it_is_the_same_store(store: Path, tmp_path: Path) -> None:
    files = sorted((store.parent / "files").iterdir())
    done = command_on_ranks(2, "prepare", *files, tmp_path / "store", CREDIT_RISK)
    assert [rank.code for rank in done] == [0, 0], done
    assert done[0].err.splitlines()
    assert done[1].err == ""
    assert contents(tmp_path / "store") == contents(store)


def test_verify_says_that_all_is_sound_or_names_the_block(store: Path, tmp_path: Path) -> None:
    sound = command("prepare", store, "--verify")
    assert sound.code == 0, sound.err
    assert Store(store).sha256 in sound.err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in store.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    data = bytearray((store / "train.numeric").read_bytes())
    data[1000] ^= 4
    (damaged / "train.numeric").write_bytes(data)
    assert_one_message(command("prepare", damaged, "--verify"), "train.numeric: block 0 (rows 1 to 17,979 of train)")
    arguments = (CREDIT_RISK, *SHORT, "wandb.mode=disabled", f"run.dir={tmp_path / 'runs'}", f"data.path={damaged}")
    assert_one_message(command("train", *arguments), "train.numeric: block 0 ")
    assert not (tmp_path / "runs").exists()


def write_many(folder: Path, count: int = 5) -> list[Path]:
    """The small table of the commands in files of 48 rows."""
    folder.mkdir()
    frame = clients()
    for number in range(count):
        frame[number * 48 : (number + 1) * 48].write_csv(folder / f"part-{number:02d}.csv")
    return sorted(folder.iterdir())


def spoil(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def bad_cell(files: list[Path]) -> None:
    lines = files[3].read_text().splitlines()
    lines[7] = "much" + lines[7][lines[7].index(",") :]
    files[3].write_text("\n".join(lines))


MISTAKES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a bad cell": (bad_cell, ("part-03.csv: column 'income', data row 7: 'much' is not a number",)),
    "a cell too many": (lambda f: f[2].write_text(f[2].read_text() + "1,2,3,4,5,6\n"), ("part-02.csv", "Row #50")),
    "not text": (lambda f: f[2].write_bytes(f[2].read_bytes() + b"1,2,\x81,4,low\n"), ("part-02.csv", "UTF-8")),
    "an infinite number": (lambda f: f[1].write_text(f[1].read_text() + "1e40,2,car,4,low\n"), ("-01.csv", "row 49")),
    "no target": (lambda f: f[4].write_text(f[4].read_text() + "1,2,car,4,\n"), ("part-04.csv", "'tier'", "row 49")),
    "a missing column": (lambda f: spoil(f[3], "purpose", "reason"), ("-03.csv: no column 'purpose'", "part-00.csv")),
    "one more column": (
        lambda f: clients()[:9].with_columns(x=pl.lit(1)).write_csv(f[1]),
        ("part-01.csv: column 'x' is not in", "part-00.csv"),
    ),
    "two columns of one name": (lambda f: spoil(f[3], "purpose", "age"), ("part-03.csv: two columns", "'age'")),
    "an empty file": (lambda f: f[2].write_bytes(b""), ("part-02.csv: the file is empty",)),
    "no rows at all": (lambda f: [x.write_text("income,age,purpose,utilisation,tier\n") for x in f], ("no rows",)),
    "one class": (lambda f: [x.write_text("age,tier\n1,low\n2,low\n") for x in f], ("only one class", "'low'")),
    "a quantity for a target": (
        lambda f: [x.write_text("age,tier\n1,0.5\n2,0.25\n") for x in f],
        ("part-00.csv: the target 'tier' holds fractions (0.5 in data row 1)",),
    ),
    "a quantity with very many values": (
        lambda f: [x.write_text("age,tier\n" + "".join(f"1,{i}.5\n" for i in range(1500))) for x in f],
        ("part-00.csv: the target 'tier' holds fractions (0.5 in data row 1)",),
    ),
    "an identifier for a target": (
        lambda f: [x.write_text("age,tier\n" + "".join(f"1,c{i}\n" for i in range(1500))) for x in f],
        ("1500 distinct values: is it a class?",),
    ),
    "another format": (lambda f: f[2].rename(f[2].with_suffix(".part")), ("part-02.part: the name must end in .csv",)),
    "no Parquet file": (lambda f: f[2].rename(f[2].with_suffix(".parquet")), ("-02.parquet: cannot be read as pa",)),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file_costs_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    spoil_files, culprits = MISTAKES[name]
    spoil_files(write_many(tmp_path / "files"))
    assert_one_message(command("prepare", tmp_path / "files" / "*", tmp_path / "store", *QUICK), *culprits)
    assert not (tmp_path / "store").exists()


USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nothing matches": (("OUT/files/*.pq", "OUT/store", *QUICK), ("OUT/files/*.pq", "matches none")),
    "a folder": (("OUT/files", "OUT/store", *QUICK), ("OUT/files: is a directory", "*.parquet")),
    "twice": (("OUT/files/*", "OUT/files/part-01.csv", "OUT/store", *QUICK), ("part-01.csv: is given twice",)),
    "no output": (("OUT/files/*", *QUICK), ("the folder to make",)),
    "no name": (("OUT/files/*", ".", *QUICK), ("the folder to make",)),
    "output is there": (("OUT/files/part-01.csv", "OUT/files", *QUICK), ("OUT/files: exists already",)),
    "output is a file": (
        ("OUT/files/part-01.csv", "OUT/files/part-02.csv", *QUICK),
        ("part-02.csv: exists already",),
    ),
    "no such target": (("OUT/files/*", "OUT/store", *QUICK, "data.target=tear"), ("no column 'tear'", "part-00.csv")),
    "no such split": (("OUT/files/*", "OUT/store", *QUICK, "data.split_column=part"), ("no column 'part'",)),
    "a wrong key": (("OUT/files/*", "OUT/store", *QUICK, "data.targt=tier"), ("data.targt", "Did you mean")),
    "all dropped": (
        ("OUT/files/*", "OUT/store", *QUICK, "data.drop=[income,age,purpose,utilisation]"),
        ("no feature columns",),
    ),
    "verify nothing": (("OUT/files", "--verify"), ("OUT/files/manifest.json: cannot be read",)),
    "verify two": (("OUT/files", "OUT/store", "--verify"), ("name one store",)),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_mistake_on_the_command_line_costs_one_line_and_writes_nothing(name: str, tmp_path: Path) -> None:
    write_many(tmp_path / "files")
    before = contents(tmp_path)
    arguments, culprits = USAGE[name]
    outcome = command("prepare", *(a.replace("OUT", str(tmp_path)) for a in arguments))
    assert_one_message(outcome, *(c.replace("OUT", str(tmp_path)) for c in culprits))
    assert contents(tmp_path) == before


def test_a_mended_file_is_read_again_and_the_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_many(tmp_path / "files")
    whole = files[3].read_bytes()
    bad_cell(files)
    arguments = (tmp_path / "files" / "*", tmp_path / "store", *QUICK)
    assert command("prepare", *arguments).code == 2
    spool = tmp_path / ".partial-store" / "spool"
    kept = {file.name: file.stat().st_mtime_ns for file in spool.glob("*.arrow")}
    assert len(kept) == 5  # whether the column is one of numbers, all cells say together
    files[3].write_bytes(whole)
    other = command("prepare", *arguments, "data.drop=[age]")
    assert_one_message(other, "holds an unfinished store of other files or of another configuration")
    assert {file.name: file.stat().st_mtime_ns for file in spool.glob("*.arrow")} == kept
    spooled: dict[str, int] = {}

    def looking(*given: Any, **more: Any) -> None:
        if given[0].name == "store":  # the last rename
            spooled.update({file.name: file.stat().st_mtime_ns for file in spool.glob("*.arrow")})
        replace(*given, **more)

    replace = os.replace
    monkeypatch.setattr(os, "replace", looking)
    assert command("prepare", *arguments).code == 0
    assert [name for name in kept if spooled[name] != kept[name]] == ["000003.arrow"]
    assert command("prepare", tmp_path / "files" / "*", tmp_path / "anew", *QUICK).code == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "anew")


OPERATIONS = ("pwrite", "fsync", "fdatasync", "replace", "rename", "mkdir", "unlink")


def _killed_at(
    pipe: Connection, operation: int, names: tuple[str, ...], files: list[str], output: Path, arguments: list[str]
) -> None:
    """Prepare, and die without a word just before the given operation on a file."""
    count = 0

    def counted(original: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **more)

        return call

    for name in names:
        setattr(os, name, counted(getattr(os, name)))
    prepare_on_rank(Collectives(World()), files, output, arguments)
    pipe.send(count)


def prepare_and_die(
    operation: int, files: list[str], output: Path, arguments: list[str], names: tuple[str, ...] = OPERATIONS
) -> int | None:
    """How many operations there were; None when it died before the given one."""
    ours, theirs = _server().Pipe(duplex=False)
    process = _server().Process(target=_killed_at, args=(theirs, operation, names, files, output, arguments))
    process.start()
    theirs.close()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL)
    return ours.recv() if process.exitcode == 0 else None


def test_a_kill_at_any_operation_on_a_file_costs_nothing_that_was_done(tmp_path: Path) -> None:
    arguments = ["data.split_column=part"]
    files = write_parts(table(), tmp_path / "files")
    total = prepare_and_die(0, files, tmp_path / "whole", arguments)
    assert total is not None
    assert total > 50
    whole = contents(tmp_path / "whole")
    output = tmp_path / "store"
    written = 0
    for operation in [*range(1, total, 9), total]:
        died = prepare_and_die(operation, files, output, arguments) is None
        if output.exists():  # it died after the rename
            assert contents(output) == whole
            break
        assert died
        blocks = sum(len(f.read_bytes().splitlines()) for f in (tmp_path / ".partial-store").glob("blocks/*"))
        assert blocks >= written  # what the former commands have done is there, and counts
        written = blocks
    assert written > 0
    if not output.exists():
        prepare_on_rank(Collectives(World()), files, output, arguments)
    assert contents(output) == whole
    again = command("prepare", *files, output, "data.target=tier")
    assert_one_message(again, "exists already")
    assert not (tmp_path / ".partial-store").exists()


def test_a_block_that_a_crash_has_torn_is_made_again(tmp_path: Path) -> None:
    files = write_parts(table(), tmp_path / "files")
    arguments = ["data.split_column=part"]
    assert prepare_and_die(0, files, tmp_path / "whole", arguments) is not None
    output = tmp_path / "store"
    assert prepare_and_die(20, files, output, arguments, ("pwrite",)) is None
    unfinished = tmp_path / ".partial-store" / "store"
    assert not (unfinished / MANIFEST).exists()
    data = np.fromfile(unfinished / "train.numeric", dtype=np.uint8)
    data[10] ^= 255
    data.tofile(unfinished / "train.numeric")
    prepare_on_rank(Collectives(World()), files, output, arguments)
    assert contents(output) == contents(tmp_path / "whole")


def test_asked_to_stop_it_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_many(tmp_path / "files")
    arguments = (tmp_path / "files" / "*", tmp_path / "store", *QUICK)
    replace, calls = os.replace, []

    def interrupting(*given: Any, **more: Any) -> None:
        calls.append(given)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        replace(*given, **more)

    monkeypatch.setattr(os, "replace", interrupting)
    stopped = command("prepare", *arguments)
    assert stopped.code == 0, stopped.err
    assert "stopped: what was done is kept in" in stopped.err
    assert not (tmp_path / "store").exists()
    assert list((tmp_path / ".partial-store" / "spool").glob("*.json"))
    done = command("prepare", *arguments)
    assert done.code == 0
    assert "going on with what is in" in done.err
    assert Store(tmp_path / "store").num_rows["train"] > 100
    assert len(files) == 5


def test_a_second_command_on_one_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(tmp_path / "files")
    arguments = (tmp_path / "files" / "*", tmp_path / "store", *QUICK)
    replace, refusals = os.replace, []

    def meanwhile(*given: Any, **more: Any) -> None:
        if not refusals and "spool" in str(given[0]):
            refusals.append("")
            refusals[0] = command_on_ranks(1, "prepare", *arguments)[0].err  # in a process of its own
        replace(*given, **more)

    monkeypatch.setattr(os, "replace", meanwhile)
    assert command("prepare", *arguments).code == 0
    assert "another job is using this unfinished store" in refusals[0]


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_many(tmp_path / "files")
    fsync = os.fsync

    def changing(handle: int) -> None:
        if "spool" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            files[0].write_text(files[0].read_text() + "1,2,car,0.1,low\n")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", changing)
    outcome = command("prepare", tmp_path / "files" / "*", tmp_path / "store", *QUICK)
    assert_one_message(outcome, "part-00.csv: the file has changed")
