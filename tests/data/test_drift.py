"""Drift: the training rows are counted in bins, other rows in the same ones."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from dist_train.data.encoding.drift import TrainingBins, drift, edges_of, moved
from dist_train.data.encoding.encoder import Encoder, fit_spec
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.data.encoding.unfamiliar import Unfamiliar, unfamiliar_cells
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.risk.stability import psi_of_categories, psi_of_numbers
from tests.data.kinds import feature_kinds


def table(seed: int, num_rows: int = 2000) -> pl.DataFrame:
    """Heavy tails with holes, few whole numbers, most of one number, more categories than have a bin."""
    random = np.random.default_rng(seed)
    holes = pl.Series(random.random(num_rows) < 0.2)
    return pl.DataFrame(
        {
            "income": pl.Series(np.exp(random.normal(10, 2, num_rows))).set(holes, None),
            "children": random.choice([0.0, 1.0, 2.0, 3.0], num_rows, p=[0.6, 0.2, 0.15, 0.05]),
            "defaults": np.where(random.random(num_rows) < 0.97, 0.0, random.integers(1, 9, num_rows)),
            "purpose": random.choice([f"p{i}" for i in range(40)], num_rows).tolist(),
        }
    )


def spec_of(frame: pl.DataFrame, transform: str) -> FeatureSpec:
    return fit_spec(
        lambda names: frame.select(names).iter_slices(300), feature_kinds(frame, [], []), ["n", "y"],
        Collectives(World()), max_categories=30, source="t", numeric_transform=transform,
    )  # fmt: skip


def counts_of(spec: FeatureSpec, frame: pl.DataFrame) -> dict[str, tuple[int, ...]]:
    return TrainingBins(spec).counts(Encoder(spec).to_arrays(frame, "t"), lambda name: frame[name].null_count())


@pytest.mark.parametrize("transform", ["robust", "quantile"])
def test_training_rows_have_not_moved_and_their_bins_are_those_of_the_cells(transform: str) -> None:
    frame = table(0)
    spec = spec_of(frame, transform)
    bins = TrainingBins(spec)
    assert counts_of(spec, frame) == bins.expected
    assert set(drift(bins.expected, bins.expected).values()) == {0.0}
    for column in spec.numeric:
        values = frame[column.name].drop_nulls().to_numpy()
        edges = edges_of(column.quantiles)
        assert edges == sorted(set(edges))
        expected = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(column.bins) - 1)
        assert column.bins == (*expected.tolist(), frame[column.name].null_count())


def test_it_is_near_the_index_of_the_report() -> None:
    frame, later = table(1), table(2)
    later = later.with_columns(pl.col("income") * 3, pl.col("purpose").str.replace("^p[0-3]$", "p5"))
    spec = spec_of(frame, "robust")
    found = drift(TrainingBins(spec).expected, counts_of(spec, later))
    numbers = [t.drop("purpose").fill_null(float("nan")) for t in (frame, later)]
    by_report = {name: psi_of_numbers(*(t[name].to_numpy() for t in numbers)) for name in numbers[0].columns}
    by_report["purpose"] = psi_of_categories(frame["purpose"], later["purpose"])
    assert found == pytest.approx(by_report, rel=0.15, abs=0.01)
    assert list(moved(TrainingBins(spec).expected, counts_of(spec, later))) == ["income", "purpose"]


def test_missing_cells_move_a_column_that_had_some_and_one_that_had_none() -> None:
    frame = table(3)
    spec = spec_of(frame, "robust")
    some = pl.when(pl.int_range(2000) < 1600).then("income")
    later = frame.with_columns(income=some, children=pl.lit(None, pl.Float64))
    found = counts_of(spec, later)
    assert found["children"][-1] == 2000
    assert sum(found["children"]) == 2000
    assert moved(TrainingBins(spec).expected, found).keys() == {"children"}
    empty = {name: (0,) * len(counts) for name, counts in found.items()}
    assert drift(TrainingBins(spec).expected, empty) == {}


def test_parts_add_up_to_the_whole() -> None:
    frame = table(6)
    spec = spec_of(frame, "robust")

    def found(part: pl.DataFrame) -> Unfamiliar:
        inputs = Encoder(spec).to_arrays(part, "t")
        return unfamiliar_cells(lambda i, j: tuple(x[i:j] for x in inputs), part.height, spec, part)

    parts = sum((found(frame[start : start + 700]) for start in range(0, 2000, 700)), Unfamiliar())
    assert {name: tuple(counts) for name, counts in parts.bins.items()} == TrainingBins(spec).expected
    assert parts.drift == found(frame).drift
    assert not parts.drift_lines()


def test_few_rows_are_not_named_for_what_chance_does() -> None:
    frame = table(4)
    spec = spec_of(frame, "robust")
    expected = TrainingBins(spec).expected
    samples = [table(seed, num_rows) for seed in range(10, 60) for num_rows in (5, 40)]
    named = sum(len(moved(expected, counts_of(spec, sample))) for sample in samples)
    assert named <= 4  # of 400: one in a thousand is what is allowed
    other = frame.head(60).with_columns(children=pl.lit(3.0))
    assert moved(expected, counts_of(spec, other)).keys() == {"children"}


def test_a_spec_of_an_earlier_release_has_no_bins() -> None:
    spec = spec_of(table(5), "robust")
    former = {key: value for key, value in spec.to_json().items() if key != "bins"}
    read = FeatureSpec.from_json(former)
    assert read.matches(spec)
    assert spec.matches(read)
    assert FeatureSpec.from_json(spec.to_json()) == spec
    assert counts_of(read, table(5)).keys() == {"purpose"}
