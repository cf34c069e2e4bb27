"""Categories beyond the vocabulary share hashed codes, and every code is counted."""

from __future__ import annotations

import json
import zlib
from typing import Any

import polars as pl
import pytest
import torch

from dist_train.config.families import FeatureKeys
from dist_train.config.load import load_config
from dist_train.data.encoding.encoder import Encoder, fit_spec
from dist_train.data.encoding.spec import FIRST_CATEGORY, MISSING, UNKNOWN, FeatureSpec
from dist_train.data.tables.table import ColumnKinds
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.models.embeddings import TableFeatures
from tests.ranks import on_ranks

WORDS = [f"shop {i}" for i in range(300)]
CELLS = [word for i, word in enumerate(WORDS) for _ in range(300 - i)] + [None] * 7


def fit(cells: list[Any], collectives: Collectives | None = None, *, limit: int = 20, buckets: int = 16) -> FeatureSpec:
    collectives = collectives or Collectives(World())
    frame = pl.DataFrame({"shop": pl.Series(cells, dtype=pl.String)})[collectives.rank :: collectives.size]
    return fit_spec(
        lambda names: frame.select(names).iter_slices(1000),
        ColumnKinds(numeric=(), categorical=("shop",)),
        ["a", "b"],
        collectives,
        max_categories=limit,
        source="t",
        hash_buckets=buckets,
    )


def codes(spec: FeatureSpec, cells: list[Any]) -> list[int]:
    frame = pl.DataFrame({"shop": pl.Series(cells, dtype=pl.String)})
    return Encoder(spec).to_arrays(frame, "t").codes[:, 0].tolist()  # type: ignore[no-any-return]


def test_frequent_categories_keep_codes_of_their_own_and_others_are_hashed() -> None:
    spec = fit(CELLS)
    assert spec.category_sizes == (FIRST_CATEGORY + 20 + 16,)
    assert codes(spec, [*WORDS[:20], None]) == [*range(FIRST_CATEGORY, FIRST_CATEGORY + 20), MISSING]
    expected = [FIRST_CATEGORY + 20 + zlib.crc32(word.encode()) % 16 for word in WORDS[20:]]
    assert codes(spec, WORDS[20:]) == expected
    assert len(set(expected)) == 16


def test_a_category_that_nobody_has_seen_gets_a_hashed_code_too_and_the_same_alone() -> None:
    spec = fit(CELLS)
    new = [f"new {i}" for i in range(100)]
    found = codes(spec, new)
    assert min(found) >= FIRST_CATEGORY + 20
    assert UNKNOWN not in found
    assert [codes(spec, [word])[0] for word in new[:9]] == found[:9]


def test_codes_are_counted_alike_in_every_world_and_through_json() -> None:
    spec = fit(CELLS)
    (column,) = spec.categorical
    assert sum(column.counts) == len(CELLS)
    assert column.counts[MISSING] == 7
    assert column.counts[FIRST_CATEGORY] == 300
    assert list(column.counts) == torch.bincount(torch.tensor(codes(spec, CELLS)), minlength=column.size).tolist()
    assert column.seen_in_training == tuple(count > 0 for count in column.counts)
    assert set(on_ranks(2, spec_on_rank)) == {json.dumps(spec.to_json())}
    assert FeatureSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def spec_on_rank(collectives: Collectives) -> str:
    return json.dumps(fit(CELLS, collectives).to_json())


def test_columns_within_the_limit_have_no_hashed_codes() -> None:
    spec = fit(["x", "y"], limit=2)
    assert spec.category_sizes == (FIRST_CATEGORY + 2,)
    assert codes(spec, ["z"]) == [UNKNOWN]


def test_a_spec_without_counts_still_matches_and_one_with_other_buckets_does_not() -> None:
    spec = fit(CELLS)
    content = spec.to_json()
    del content["categorical"][0]["counts"]
    assert FeatureSpec.from_json(content).matches(spec)
    assert spec.matches(FeatureSpec.from_json(content))
    assert not spec.matches(fit(CELLS, buckets=8))


def test_codes_that_did_not_occur_add_nothing_and_frequencies_rise_with_counts() -> None:
    spec = fit(CELLS[:5000], buckets=64)
    features = TableFeatures(spec, FeatureKeys(category_frequencies=True))
    (column,), (embedding,) = spec.categorical, features.embeddings
    unseen = [code for code, seen in enumerate(column.seen_in_training) if not seen]
    assert unseen
    assert embedding.weight[unseen].eq(0).all()
    order = sorted(range(column.size), key=lambda code: column.counts[code])
    rows = features(torch.zeros(column.size, 0), torch.zeros(column.size, 0), torch.tensor(order).unsqueeze(1))
    assert rows.shape[1] == features.width == sum(features.widths)
    assert (rows[:, -1].diff() >= 0).all()
    assert rows[:, -1].abs().max() < 4


def test_fewer_than_no_buckets_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.hash_buckets: must be at least 0"):
        load_config(["data.hash_buckets=-1"])
