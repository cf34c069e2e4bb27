"""The same table as CSV, JSON lines, Parquet, compressed, in another order of columns, in every type that holds it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_train.config.load import load_config
from dist_train.distributed.world import World
from dist_train.run import job

ROWS = 120
RANDOM = np.random.default_rng(7)
CLASS = RANDOM.integers(0, 2, ROWS)
WHOLE = [None if i % 11 == 0 else int(v) for i, v in enumerate(RANDOM.integers(0, 100, ROWS) + 20 * CLASS)]
EIGHTHS = (np.round(RANDOM.normal(size=ROWS) * 8) / 8 + CLASS).tolist()  # float16 and decimals hold them
FLAG = (RANDOM.random(ROWS) < 0.4).tolist()
CODE = RANDOM.integers(1, 5, ROWS).tolist()
RATE = [["1.50", "2.25", "0.10"][i] for i in RANDOM.integers(0, 3, ROWS)]
PURPOSE = [[None, "car", "house", "ü, ö"][i] for i in RANDOM.integers(0, 4, ROWS)]


def plain() -> dict[str, pa.Array]:
    return {
        "whole": pa.array(WHOLE, pa.int64()),
        "eighths": pa.array(EIGHTHS),
        "flag": pa.array(FLAG),
        "code": pa.array(CODE),
        "rate": pa.array([float(text) for text in RATE]),
        "purpose": pa.array(PURPOSE),
        "y": pa.array(CLASS),
    }


TYPES: dict[str, dict[str, pa.Array]] = {
    "int8, float32": {"whole": pa.array(WHOLE, pa.int16()), "eighths": pa.array(EIGHTHS, pa.float32())},
    "uint64, float16": {"whole": pa.array(WHOLE, pa.uint64()), "eighths": pa.array(EIGHTHS).cast(pa.float16())},
    "floats, decimal128": {
        "whole": pa.array(WHOLE, pa.float64()),
        "eighths": pa.array(EIGHTHS).cast(pa.decimal128(9, 3)),
    },
    "decimals of whole numbers, text of numbers": {
        "whole": pa.array(WHOLE).cast(pa.decimal128(22, 2)),
        "eighths": pa.array([str(value) for value in EIGHTHS]),
    },
    "decimal256, large text": {
        "eighths": pa.array(EIGHTHS).cast(pa.decimal128(9, 3)).cast(pa.decimal256(40, 3)),
        "purpose": pa.array(PURPOSE, pa.large_string()),
    },
    "dictionaries": {
        "whole": pa.array(WHOLE).dictionary_encode(),
        "flag": pa.array(FLAG).cast(pa.string()).dictionary_encode(),
        "code": pa.array(CODE).dictionary_encode(),
        "purpose": pa.array(PURPOSE).dictionary_encode(),
    },
    "views and bytes": {"purpose": pa.array(PURPOSE, pa.string_view()), "code": pa.array([b"%d" % c for c in CODE])},
    "categories in other types": {
        "flag": pa.array(["True" if flag else "False" for flag in FLAG]),
        "code": pa.array([f"{code}.0" for code in CODE]),
        "rate": pa.array(RATE).cast(pa.decimal128(12, 2)),
        "y": pa.array(CLASS, pa.float64()),
    },
    "words for missing": {"purpose": pa.array([text or "NA" for text in PURPOSE]), "y": pa.array(CLASS, pa.uint8())},
    "NaN for missing": {"whole": pa.array([np.nan if value is None else value for value in WHOLE])},
    "columns that are not used": {
        "when": pa.array([0] * ROWS, pa.timestamp("us", "+05:30")),
        "__index_level_0__": pa.array(range(ROWS, 0, -1)),
    },
}


def bits(file: Path, *, columns: bool = False) -> str:
    """SHA-256 of the weights of a short job in the exact mode."""
    keys = [
        f"data.path={file}", "data.target=y", "data.categorical=[code,rate]", "train.virtual_ranks=2",
        "train.max_steps=4", "train.global_batch_size=32", "model.hidden_dim=8", "schedule.warmup_steps=1",
        "wandb.mode=disabled", "runtime.device=cpu", f"run.dir={file.parent}", f"run.name=run-{file.name}",
    ]  # fmt: skip
    config = load_config([*keys, "data.drop=[when]"] if columns else keys)
    summary = job.train(config, World(), {}, handle_signals=False)
    assert summary is not None
    return str(summary["weights_sha256"])


def written(folder: Path, columns: dict[str, pa.Array], name: str = "t.parquet") -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bits(written(tmp_path_factory.mktemp("plain"), plain()))


@pytest.mark.parametrize("name", TYPES)
def test_types_do_not_matter(name: str, expected: str, tmp_path: Path) -> None:
    assert bits(written(tmp_path, plain() | TYPES[name]), columns="when" in TYPES[name]) == expected


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "row groups"])
def test_files_do_not_matter(kind: str, expected: str, tmp_path: Path) -> None:
    table = pa.table(plain())
    if kind == "row groups":
        file = tmp_path / "t.parquet"
        pq.write_table(table, file, row_group_size=17, compression="zstd", version="1.0")
    else:
        file = tmp_path / f"t.{kind}"
        frame = pl.DataFrame(table)
        content = (frame.write_ndjson() if kind == "jsonl" else frame.write_csv()).encode()
        file.write_bytes(gzip.compress(content) if kind == "csv.gz" else content)
    assert bits(file) == expected


def test_the_place_of_the_target_does_not_matter_and_the_order_of_features_is_that_of_the_model(
    expected: str, tmp_path: Path
) -> None:
    columns = plain()
    assert bits(written(tmp_path, {"y": columns["y"], **columns})) == expected
    assert bits(written(tmp_path, dict(reversed(columns.items())), "reversed.parquet")) != expected
