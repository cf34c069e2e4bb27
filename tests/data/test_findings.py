"""What the columns of a table became is said, and so is what looks wrong about them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from dist_train.config.schema import DataConfig
from dist_train.data.dataset import load_dataset
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from tests.ranks import on_ranks

ROWS = 300
RANDOM = np.random.default_rng(3)
CLASS = RANDOM.integers(0, 3, ROWS)


def table(**columns: object) -> pl.DataFrame:
    given = {"x": RANDOM.normal(size=ROWS) + CLASS, "kind": RANDOM.choice(["a", "b", "c"], ROWS).tolist()}
    return pl.DataFrame(given | columns | {"y": [["low", "mid", "top"][i] for i in CLASS]})


def findings(frame: pl.DataFrame, folder: Path, caplog: pytest.LogCaptureFixture, **keys: object) -> list[str]:
    """The warnings of reading a table, and the lines of the plan."""
    file = folder / "t.csv"
    frame.write_csv(file)
    data = DataConfig(**({"path": str(file), "target": "y"} | keys))  # type: ignore[arg-type]
    logger = logging.getLogger("dist_train")
    logger.addHandler(caplog.handler)
    try:
        dataset = load_dataset(data, Collectives(World()), seed=0, dtype=torch.float32)
    finally:
        logger.removeHandler(caplog.handler)
    return [*caplog.messages, *dataset.columns]


def test_a_table_with_nothing_strange_is_described_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert findings(table(), tmp_path, caplog) == ["numbers    1: x", "categories 1: kind (3 levels)"]


def test_what_was_left_out_is_said_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = table(row=range(ROWS), constant=[1.5] * ROWS, memo=["-"] * ROWS, **{"Unnamed: 0": CLASS})
    left_out = findings(frame, tmp_path, caplog, drop=["memo"])[-1]
    for part in (
        "Unnamed: 0 (an index of pandas)",
        "row (the number of the row)",
        "memo (data.drop)",
        "constant (has one",
    ):
        assert part in left_out


def test_many_columns_are_counted_and_not_all_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = table(**{f"g{i}": RANDOM.normal(size=ROWS) for i in range(50)})
    assert findings(frame, tmp_path, caplog)[0].endswith("g18 and 31 more")


TELLING = {
    "a copy": [["low", "mid", "top"][i] for i in CLASS],
    "codes": CLASS.tolist(),
    "names of other words": [["c", "a", "b"][i] for i in CLASS],
    "a number of which ranges are the classes": (CLASS * 10 + RANDOM.random(ROWS)).tolist(),
    "a number that is missing for one class": [None if i == 0 else float(i) for i in CLASS],
    "a category that is missing for one class": [["", "p", "q"][i] for i in CLASS],
}


@pytest.mark.parametrize("name", TELLING)
def test_a_column_that_alone_tells_the_target_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = [line for line in findings(table(leak=TELLING[name]), tmp_path, caplog) if "alone tells" in line]
    assert {line.split("'")[1] for line in found} == {"leak"}


def test_a_column_that_is_wrong_in_one_training_row_does_not_tell_the_target(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    almost = CLASS.copy()
    almost[:150] = (almost[:150] + (np.arange(150) % 30 == 0)) % 3
    assert not any("alone tells" in line for line in findings(table(almost=almost), tmp_path, caplog))


def telling_on_rank(collectives: Collectives, path: Path) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_train").addHandler(handler)
    load_dataset(DataConfig(path=str(path), target="y"), collectives, seed=0, dtype=torch.float32)
    return lines


def test_ranks_look_at_it_together(tmp_path: Path) -> None:
    table(leak=TELLING["codes"]).write_parquet(tmp_path / "t.parquet", row_group_size=50)
    first, second = on_ranks(2, telling_on_rank, tmp_path / "t.parquet")
    assert any("'leak' alone tells" in line for line in first)
    assert second == []


def test_identifiers_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shuffled = RANDOM.permutation(ROWS)
    frame = table(
        loan=[f"LC{number:05d}x" for number in shuffled],
        rising=np.cumsum(RANDOM.integers(1, 1000, ROWS)),
        dense=shuffled + 5000,
        customer_id=RANDOM.integers(0, 10**9, ROWS),
        income=RANDOM.integers(0, 10**6, ROWS),
        age=RANDOM.integers(18, 90, ROWS),
    )
    named = {line.split("'")[1] for line in findings(frame, tmp_path, caplog) if "identifier" in line}
    assert named == {"loan", "rising", "dense", "customer_id"}


def test_more_categories_than_are_kept_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = table(city=[f"city {i % 60}" for i in range(ROWS)])
    lines = findings(frame, tmp_path, caplog, max_categories=10)
    assert any("'city' has more than 10 categories" in line for line in lines)
    assert "city (the 10 most frequent levels)" in lines[-1]


def test_codes_that_are_read_as_numbers_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = table(zip=[["02413", "10001", "94105"][i % 3] for i in range(ROWS)], branch=RANDOM.integers(0, 6, ROWS))
    lines = findings(frame, tmp_path, caplog)
    assert any("'zip' holds '02413'" in line and "data.categorical" in line for line in lines)
    assert any("branch (6)" in line for line in lines)
    caplog.clear()
    lines = findings(frame, tmp_path, caplog, categorical=["zip", "branch"])
    assert lines[-1] == "categories 3: kind (3 levels), zip (3 levels), branch (6 levels)"
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["split", "Fold", "set", "is_train", "data_split"])
def test_a_feature_that_is_named_like_a_split_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = table(**{name: RANDOM.choice(["train", "valid", "test"], ROWS).tolist()})
    assert any(f"column {name!r} is a feature, and" in line for line in findings(frame, tmp_path, caplog))
    caplog.clear()
    findings(frame, tmp_path, caplog, split_column=name) if "split" in name else None
    assert not any("is a feature, and" in line for line in caplog.messages)


def test_words_for_missing_that_are_taken_away_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = findings(table(), tmp_path, caplog, missing_values=["-"])
    assert any("replaces the default words: '', 'NA', 'N/A'" in line for line in lines)
    caplog.clear()
    findings(table(), tmp_path, caplog, missing_values=["-", *DataConfig().missing_values])
    assert caplog.messages == []
