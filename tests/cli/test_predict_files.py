"""predict on files of several chunks: bounded memory, columns carried over, and a killed process that is continued."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest
import torch

from dist_train.data.tables.chunks import ChunkedFile
from dist_train.run.scoring import partial_scores
from dist_train.run.scoring.partial_scores import PartialScores
from tests.cli.conftest import Trained
from tests.cli.in_process import CommandResult, command
from tests.cli.tables import clients, run_arguments
from tests.ranks import in_processes

ROWS = 7000  # four chunks of 2,048 rows


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    with of_small_chunks():
        yield


@contextmanager
def of_small_chunks() -> Iterator[None]:
    now = patch.object(partial_scores, "_SECONDS_BETWEEN_RECORDS", 0)
    with patch("dist_train.data.tables.chunks._ROWS_OF_A_CHUNK", 1), now:
        yield


def predict_on_ranks(*arguments: object) -> list[CommandResult]:
    """On two ranks, with chunks as small as here."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return in_processes(2, _rank, port, arguments)


def _rank(rank: int, port: int, arguments: tuple[object, ...]) -> CommandResult:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    with of_small_chunks():
        return command("predict", *arguments, MASTER_ADDR="127.0.0.1", **{k: str(v) for k, v in place.items()})


def table() -> pl.DataFrame:
    return clients(ROWS).with_columns(client=pl.format("A{}", pl.int_range(pl.len()))).drop("tier")


def scored(trained: Trained, source: Path, output: Path, *more: object) -> str:
    outcome = command("predict", trained.folder, source, output, *more)
    assert outcome.code == 0, outcome.err
    return outcome.err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_chunks_give_the_bytes_of_the_whole(kind: str, trained: Trained, tmp_path: Path) -> None:
    source = tmp_path / f"in.{kind}"
    getattr(table(), f"write_{kind}")(source)
    scored(trained, source, tmp_path / "chunks.csv")
    with patch("dist_train.data.tables.chunks._ROWS_OF_A_CHUNK", 1 << 16):
        scored(trained, source, tmp_path / "whole.csv")
    assert (tmp_path / "chunks.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert pl.read_csv(tmp_path / "whole.csv").height == ROWS


def test_two_ranks_write_the_bytes_of_one(trained: Trained, tmp_path: Path) -> None:
    table().write_csv(tmp_path / "in.csv")
    for kind in ("csv", "parquet"):
        scored(trained, tmp_path / "in.csv", tmp_path / f"one.{kind}", "--keep", "client")
        two = tmp_path / f"two.{kind}"
        for outcome in predict_on_ranks(trained.folder, tmp_path / "in.csv", two, "--keep", "client"):
            assert outcome.code == 0, outcome.err
        assert (tmp_path / f"two.{kind}").read_bytes() == (tmp_path / f"one.{kind}").read_bytes()


def test_a_store_has_the_scores_of_its_file_on_any_number_of_ranks(trained: Trained, tmp_path: Path) -> None:
    keys = [argument for argument in run_arguments(trained.folder, trained.csv) if argument.startswith("data.")]
    prepared = command("prepare", trained.csv, tmp_path / "store", *[key for key in keys if "data.path" not in key])
    assert prepared.code == 0, prepared.err
    scored(trained, trained.csv, tmp_path / "file.parquet")
    scored(trained, tmp_path / "store", tmp_path / "store.parquet")
    found = pl.read_parquet(tmp_path / "store.parquet")
    assert found["row"].to_list() == list(range(found.height))
    assert found.drop("row").equals(pl.read_parquet(tmp_path / "file.parquet"))
    for outcome in predict_on_ranks(trained.folder, tmp_path / "store", tmp_path / "two.parquet"):
        assert outcome.code == 0, outcome.err
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "store.parquet").read_bytes()
    refused = command("predict", trained.folder, tmp_path / "store", tmp_path / "no.csv", "--keep", "age")
    assert (refused.code, "--keep: " in refused.err, "is a store, which holds no cells" in refused.err) == (
        2,
        True,
        True,
    )


def test_columns_are_carried_over_as_they_stand(trained: Trained, tmp_path: Path) -> None:
    ids = ["007", "NA", "", 'a "b", c'] * (ROWS // 4)
    frame = table().with_columns(client=pl.Series(ids), note=pl.lit("NA"))
    frame.write_csv(tmp_path / "in.csv")
    scored(trained, tmp_path / "in.csv", tmp_path / "plain.parquet")
    for kind in ("csv", "parquet"):
        scored(trained, tmp_path / "in.csv", tmp_path / f"out.{kind}", "--keep", "client", "--keep", "age")
    found = pl.read_csv(tmp_path / "out.csv", infer_schema=False)
    assert found.columns[:3] == ["client", "age", "probability_high"]
    assert found["client"].to_list() == [None if cell == "" else cell for cell in ids]
    assert found["age"].cast(pl.Int64).to_list() == frame["age"].to_list()
    plain = pl.read_parquet(tmp_path / "plain.parquet")
    assert pl.read_parquet(tmp_path / "out.parquet").select(plain.columns).equals(plain)


def test_a_word_for_missing_means_it_beside_a_kept_column(trained: Trained, tmp_path: Path) -> None:
    frame = table().with_columns(
        purpose=pl.when(pl.int_range(pl.len()) % 3 == 0).then(pl.lit("NA")).otherwise("purpose")
    )
    frame.write_csv(tmp_path / "in.csv")
    scored(trained, tmp_path / "in.csv", tmp_path / "plain.parquet")
    scored(trained, tmp_path / "in.csv", tmp_path / "kept.parquet", "--keep", "purpose")
    kept, plain = pl.read_parquet(tmp_path / "kept.parquet"), pl.read_parquet(tmp_path / "plain.parquet")
    assert kept["purpose"].to_list() == frame["purpose"].to_list()
    assert kept.drop("purpose").equals(plain)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["branch"], "no column 'branch' (--keep names it)"),
        (["predicted_class"], "--keep predicted_class: the output has a column of that name"),
        (["client", "client"], "--keep client: is given twice"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(
    keep: list[str], message: str, trained: Trained, tmp_path: Path
) -> None:
    table().write_csv(tmp_path / "in.csv")
    named = [argument for name in keep for argument in ("--keep", name)]
    outcome = command("predict", trained.folder, tmp_path / "in.csv", tmp_path / "out.csv", *named)
    assert outcome.code == 2
    assert message in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_a_mistake_in_a_later_chunk_is_named_by_its_row_and_nothing_is_left(trained: Trained, tmp_path: Path) -> None:
    frame = table().with_columns(
        age=pl.when(pl.int_range(pl.len()) == 5999).then(pl.lit("old")).otherwise(pl.col("age").cast(pl.String))
    )
    frame.write_csv(tmp_path / "in.csv")
    for outcomes in (
        [command("predict", trained.folder, tmp_path / "in.csv", tmp_path / "out.csv")],
        predict_on_ranks(trained.folder, tmp_path / "in.csv", tmp_path / "out.csv")[:1],
    ):
        assert outcomes[0].code == 2
        assert "column 'age', data row 6000: 'old' is not a number" in outcomes[0].err
        assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def killed_after(chunks: int, trained: Trained, source: Path, output: Path) -> None:
    """Score a file in a process that is killed once it has written some chunks."""

    arguments = (trained.folder, source, output, "--keep", "client")
    process = multiprocessing.get_context("forkserver").Process(target=_predict_and_die, args=(chunks, arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()


def _predict_and_die(chunks: int, arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)  # a round is one chunk
    append, written = PartialScores.append, []

    def append_and_die(self: PartialScores, *scores: Any) -> None:
        append(self, *scores)
        written.append(1)
        if len(written) == chunks:
            self._stream.write(b"half a row")
            self._stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    with of_small_chunks(), patch.object(PartialScores, "append", append_and_die):
        command("predict", *arguments)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_killed_process_is_continued_to_the_same_bytes(kind: str, trained: Trained, tmp_path: Path) -> None:
    source, output = tmp_path / "in.csv", tmp_path / f"out.{kind}"
    frame = table().with_columns(
        purpose=pl.when(pl.int_range(pl.len()) < 5000).then(pl.lit("yacht")).otherwise("purpose")
    )
    frame.write_csv(source)
    whole = command("predict", trained.folder, source, tmp_path / f"whole.{kind}", "--keep", "client")
    killed_after(2, trained, source, output)
    continued = command("predict", trained.folder, source, output, "--keep", "client")
    assert continued.code == 0, continued.err
    assert "the first 4096 rows were scored before" in continued.err
    assert output.read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert json.loads(continued.out) == json.loads(whole.out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", f"out.{kind}", f"whole.{kind}"]


def test_another_input_begins_anew(trained: Trained, tmp_path: Path) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    table().write_csv(source)
    killed_after(2, trained, source, output)
    table().reverse().write_csv(source)
    assert "scored before" not in scored(trained, source, output, "--keep", "client")
    scored(trained, source, tmp_path / "whole.csv", "--keep", "client")
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_an_output_that_another_process_writes_is_refused(trained: Trained, tmp_path: Path) -> None:
    table().write_csv(tmp_path / "in.csv")
    other = PartialScores(tmp_path / "out.csv", {}, 1)
    outcome = command("predict", trained.folder, tmp_path / "in.csv", tmp_path / "out.csv")
    other.discard()
    assert outcome.code == 2
    assert "out.csv: another process is writing it" in outcome.err


@pytest.mark.parametrize("rows", [0, 1, 2048, 2049, 4096])
def test_a_file_is_cut_alike_from_every_row_on(rows: int, tmp_path: Path) -> None:
    pl.DataFrame({"a": [str(i) for i in range(rows)]}, schema={"a": pl.String}).write_csv(tmp_path / "t.csv")
    file = ChunkedFile(tmp_path / "t.csv", ["a"], [], [""], multiple_of=2048)
    chunks = list(file.chunks())
    assert [chunk.features.height for chunk in chunks] == [2048] * (rows // 2048) + [rows % 2048] * bool(
        rows % 2048 or not rows
    )
    assert pl.concat(chunk.features for chunk in chunks)["a"].to_list() == [str(i) for i in range(rows)]
    for chunk in chunks[1:]:
        rest = pl.concat(part.features for part in file.chunks(chunk.first_row))
        assert rest["a"][0] == str(chunk.first_row)
