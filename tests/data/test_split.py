"""Splits: by column as it says; by fraction stratified, exact to one row, and a function of seed and row number."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from torch import Tensor

from dist_train.data.splits.split import SPLITS, Split, split_by_column, split_by_fraction
from dist_train.errors import UserError


def of(split: Split, num_rows: int) -> list[str]:
    """Name of the split of each row; every row must be in exactly one."""
    names = [""] * num_rows
    for name in SPLITS:
        for row in split[name].tolist():
            assert names[row] == ""
            names[row] = name
    assert "" not in names
    return names


def classes(*counts: int) -> Tensor:
    """Class indices with the given counts, shuffled."""
    rows = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))]


def test_a_column_says_it_in_every_spelling() -> None:
    words = ["train", "valid", "val", "validation", "test", "Train", "VAL", "Validation", "TEST"]
    split = split_by_column(pl.Series("part", words), "t")
    assert of(split, 9) == ["train", "valid", "valid", "valid", "test", "train", "valid", "valid", "test"]
    assert all(rows.dtype == torch.int64 for rows in split.values())


def test_a_split_that_no_row_names_is_empty() -> None:
    split = split_by_column(pl.Series("part", ["train", "train"]), "t")
    assert [len(split[name]) for name in SPLITS] == [2, 0, 0]


@pytest.mark.parametrize("word", ["dev", None, "", " train"])
def test_another_word_is_named_by_row(word: str | None) -> None:
    with pytest.raises(UserError, match="t: column 'part', data row 3: "):
        split_by_column(pl.Series("part", ["train", "test", word]), "t")


def test_categories_are_text_and_missing_is_a_cell() -> None:
    words = pl.Series("part", ["train", "val", "test"])
    for column in (words.cast(pl.Categorical), words.cast(pl.Enum(["test", "train", "val"]))):
        assert of(split_by_column(column, "t"), 3) == ["train", "valid", "test"]
    with pytest.raises(UserError, match="t: column 'part', data row 1: None is not a split"):
        split_by_column(pl.Series("part", [None], dtype=pl.Null), "t")


def test_integers_are_no_splits() -> None:
    with pytest.raises(UserError, match="t: column 'part', data row 1: 0 is not a split; train, valid"):
        split_by_column(pl.Series("part", [0, 1]), "t")


@pytest.mark.parametrize(
    "column",
    [
        pl.Series("part", [["train"], ["test"]]),
        pl.Series("part", [{"is": "train"}, {"is": "test"}]),
        pl.Series("part", [0.5, None]),
        pl.Series("part", ["2020-01-01", "2020-01-02"]).str.to_date(),
        pl.Series("part", ["2020-01-01", "2020-01-02"]).str.to_datetime(),
        pl.Series("part", [b"train", b"\xff"]),
    ],
    ids=lambda column: str(column.dtype),
)
def test_a_type_that_is_not_text_is_named(column: pl.Series) -> None:
    with pytest.raises(UserError, match=r"t: column 'part' has type .*a split is text") as caught:
        split_by_column(column, "t")
    assert str(column.dtype) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fractions", [(0.15, 0.15), (0.0, 0.3), (0.3, 0.0), (0.0, 0.0), (0.333, 0.1)])
def test_each_class_is_shared_out_exactly(fractions: tuple[float, float]) -> None:
    counts = (1000, 333, 41, 7, 1)
    targets = classes(*counts)
    split = split_by_fraction(targets, validation_fraction=fractions[0], test_fraction=fractions[1], seed=5)
    of(split, len(targets))
    for index, count in enumerate(counts):
        for name, fraction in (("valid", fractions[0]), ("test", fractions[1])):
            assert abs(int((targets[split[name]] == index).sum()) - count * fraction) <= 0.5
    assert all((rows.diff() > 0).all() for rows in split.values())


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    targets = classes(300, 200)

    def names(seed: int) -> list[str]:
        return of(split_by_fraction(targets, validation_fraction=0.2, test_fraction=0.2, seed=seed), len(targets))

    assert names(1) == names(1)
    # Two independent splits of shares 0.6, 0.2, 0.2 agree on 44 % of the rows.
    agreement = sum(a == b for a, b in zip(names(1), names(2), strict=True)) / len(targets)
    assert 0.3 < agreement < 0.6


def test_a_row_keeps_its_place_when_rows_are_appended() -> None:
    """A row's hash does not depend on the others: with more rows only those near a border change sides."""
    targets = classes(2000, 1000)
    more = torch.cat([targets, classes(200, 100)])
    shares = {"validation_fraction": 0.15, "test_fraction": 0.15}
    before = of(split_by_fraction(targets, **shares, seed=5), len(targets))
    after = of(split_by_fraction(more, **shares, seed=5), len(more))
    moved = sum(a != b for a, b in zip(before, after[: len(before)], strict=True))
    assert moved < 0.05 * len(before)


def test_a_split_does_not_follow_the_order_of_the_table() -> None:
    split = split_by_fraction(torch.zeros(3000, dtype=torch.int64), validation_fraction=0.2, test_fraction=0.2, seed=0)
    for name in SPLITS:
        # The mean row number of a random subset is near the middle (five standard errors).
        error = 3000 / 12**0.5 / len(split[name]) ** 0.5
        assert abs(split[name].double().mean() - 1500) < 5 * error


def test_the_classes_of_other_rows_hardly_move_a_row() -> None:
    """Rows are ranked by the hash of their own number: what the table says of other rows moves the borders only."""
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    alone = of(split_by_fraction(torch.zeros(4000, dtype=torch.int64), **shares, seed=5), 4000)
    halves = of(split_by_fraction((torch.arange(4000) < 2000).long(), **shares, seed=5), 4000)
    assert sum(a != b for a, b in zip(alone, halves, strict=True)) < 0.1 * 4000
