"""The encoder: fitted on the training rows alone, to the same bits on any number of ranks."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from dist_train.data.encoding.encoder import Encoder, Pieces, fit_spec
from dist_train.data.encoding.spec import FIRST_CATEGORY, MISSING, NUM_QUANTILES, UNKNOWN, FeatureSpec
from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.models.embeddings import TabularInputs
from dist_train.system.console import log
from tests.data.kinds import feature_kinds
from tests.ranks import on_ranks


def table(num_rows: int = 301) -> pl.DataFrame:
    """Heavy tails, holes, a constant, almost a constant, nothing, text, codes."""
    random = np.random.default_rng(11)

    def holes(values: Any, share: float) -> pl.Series:
        return pl.Series(values).set(pl.Series(random.random(num_rows) < share), None)

    return pl.DataFrame(
        {
            "income": holes(np.exp(random.normal(10, 3, num_rows)), 0.2),
            "balance": random.normal(0, 1e-3, num_rows),
            "constant": [7.5] * num_rows,
            "rare": [0.0] * (num_rows - 3) + [5.0, 1.0, 2.0],
            "nothing": pl.Series([None] * num_rows, dtype=pl.Float64),
            "purpose": holes(random.choice(["car", "house", "träume"], num_rows, p=[0.2, 0.5, 0.3]), 0.1),
            "code": random.integers(0, 5, num_rows),
        }
    )


def fit(frame: pl.DataFrame, collectives: Collectives | None = None, *, max_categories: int = 256) -> Encoder:
    kinds = feature_kinds(frame, [], ["code"] if "code" in frame.columns else [])
    collectives = collectives or Collectives(World())
    begin, end = split_evenly(0, frame.height, collectives.size)[collectives.rank]
    pieces = pieces_of(frame[begin:end])
    return Encoder(fit_spec(pieces, kinds, ["bad", "good"], collectives, max_categories=max_categories, source="t"))


def pieces_of(frame: pl.DataFrame) -> Pieces:
    return lambda names: frame.select(names).iter_slices(100)


def features(encoder: Encoder, frame: pl.DataFrame) -> Tensor:
    """What a model with one-hot categories sees."""
    return TabularInputs(encoder.spec)(*encoder.to_arrays(frame, "t"))  # type: ignore[no-any-return]


def categories(encoder: Encoder) -> dict[str, list[str]]:
    return {column.name: list(column.categories) for column in encoder.spec.categorical}


def image(encoder: Encoder) -> str:
    """An encoder to the bit."""
    return json.dumps(encoder.spec.to_json())


def image_on_rank(collectives: Collectives, frame: pl.DataFrame, max_categories: int) -> str:
    return image(fit(frame, collectives, max_categories=max_categories))


@pytest.mark.parametrize("num_rows", [301, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_it_is_the_same_to_the_bit_on_any_number_of_ranks(world_size: int, num_rows: int) -> None:
    """Two rows on three ranks: one rank has none."""
    frame = table()[:num_rows]
    alone = image(fit(frame, max_categories=2))
    assert on_ranks(world_size, image_on_rank, frame, 2) == [alone] * world_size


def test_numbers_are_scaled_by_median_and_quartiles_and_clipped_smoothly() -> None:
    """RealMLP's preprocessing (Holzmüller, Grinsztajn and Steinwart 2024), written out with numpy."""
    frame = table().select("income", "balance")
    encoded = features(fit(frame), frame)
    for index, name in enumerate(("income", "balance")):
        values = frame[name].to_numpy().astype(np.float64)
        lower, median, upper = np.nanquantile(values, (0.25, 0.5, 0.75))
        scaled = (np.where(np.isnan(values), median, values) - median) / (upper - lower)
        expected = scaled / np.sqrt(1 + (scaled / 3) ** 2)
        np.testing.assert_allclose(encoded[:, index].numpy(), expected, rtol=1e-6, atol=1e-6)
    assert encoded.abs().max() <= 3


def test_without_quartiles_half_the_range_is_the_scale_and_a_constant_encodes_to_zero() -> None:
    frame = table().select("constant", "rare")
    encoded = features(fit(frame), frame)
    assert (encoded[:, 0] == 0).all()
    np.testing.assert_allclose(encoded[-3:, 1], [x / np.sqrt(1 + (x / 3) ** 2) for x in (2.0, 0.4, 0.8)], rtol=1e-6)
    assert (features(fit(frame), pl.DataFrame({"constant": [1e30], "rare": [0.0]})) == 0).all()


def test_missing_numbers_are_the_median_and_flagged_where_training_had_some() -> None:
    frame = table().select("income", "balance")
    encoder = fit(frame)
    assert [column.has_missing_flag for column in encoder.spec.numeric] == [True, False]
    encoded = features(encoder, pl.DataFrame({"income": [None, 5.0], "balance": [0.0, None]}))
    assert encoded.shape == (2, 3)
    assert encoded[0, 0] == 0
    assert encoded[1, 1] == 0
    assert encoded[:, 2].tolist() == [1.0, 0.0]


def test_a_column_without_values_adds_only_its_flag() -> None:
    frame = table().select("nothing", "balance")
    encoded = features(fit(frame), frame)
    assert (encoded[:, 0] == 0).all()
    assert (encoded[:, 2] == 1).all()
    assert features(fit(frame), pl.DataFrame({"nothing": [3e38], "balance": [0.0]}))[0, 0] == 0


def warnings_on_rank(collectives: Collectives, frame: pl.DataFrame) -> list[str]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        fit(frame, collectives)
    finally:
        log.removeHandler(handler)
    return said


@pytest.mark.parametrize("world_size", [1, 2])
def test_numbers_that_tell_nothing_are_named_once(world_size: int) -> None:
    expected = [
        "column 'constant' holds one number in the training rows: it is ignored",
        "column 'nothing' has no values in the training rows: it is ignored",
    ]
    assert on_ranks(world_size, warnings_on_rank, table()) == [expected] + [[]] * (world_size - 1)


def test_categories_have_a_code_each_the_most_frequent_first() -> None:
    encoder = fit(pl.DataFrame({"x": ["b", "a", "b", "c", "a", "b", None]}))
    assert categories(encoder) == {"x": ["b", "a", "c"]}
    encoded = features(encoder, pl.DataFrame({"x": ["b", "c", None, "new"]}))
    assert encoded.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_equally_frequent_categories_are_in_the_order_of_their_names() -> None:
    assert categories(fit(pl.DataFrame({"x": ["c", "a", "b", "b", "a", "c"]}))) == {"x": ["a", "b", "c"]}


def test_categories_beyond_the_limit_share_the_code_for_unknown_ones() -> None:
    encoder = fit(pl.DataFrame({"x": ["a", "a", "b", "b", "c"]}), max_categories=2)
    assert categories(encoder) == {"x": ["a", "b"]}
    # The code occurred in training, so an unknown category uses it; a missing cell did not occur.
    assert features(encoder, pl.DataFrame({"x": ["c", "new", None]})).tolist() == [[0, 1, 0, 0]] * 2 + [[0] * 4]


def test_numbers_flags_and_codes_are_handed_on_apart() -> None:
    frame = table()
    encoder = fit(frame)
    inputs = encoder.to_arrays(frame, "t")
    assert inputs.numeric.shape == (301, 5)
    assert inputs.flags.shape == (301, 2)
    assert (inputs.numeric.dtype, inputs.flags.dtype, inputs.codes.dtype) == (torch.float32, torch.uint8, torch.uint8)
    for flag, name in enumerate(("income", "nothing")):
        assert inputs.flags[:, flag].tolist() == frame[name].is_null().to_list()
    assert encoder.spec.category_sizes == (2 + 3, 2 + 5)
    words = categories(encoder)["purpose"]
    expected = [MISSING if word is None else FIRST_CATEGORY + words.index(word) for word in frame["purpose"]]
    assert inputs.codes[:, 0].tolist() == expected
    new = frame[:1].with_columns(purpose=pl.lit("new"))
    assert encoder.to_arrays(new, "t").codes[0, 0] == UNKNOWN


@pytest.mark.parametrize(("count", "dtype"), [(254, torch.uint8), (255, torch.int16), (32767, torch.int32)])
def test_codes_take_the_smallest_type_that_holds_them(count: int, dtype: torch.dtype) -> None:
    frame = pl.DataFrame({"x": [f"word {i}" for i in range(count)]})
    codes = fit(frame, max_categories=count).to_arrays(frame, "t").codes
    assert codes.dtype == dtype
    assert codes.long().sort(0).values.flatten().tolist() == list(range(2, 2 + count))


def test_quantiles_are_those_of_numpy() -> None:
    frame = table()
    for column in fit(frame).spec.numeric:
        values = frame[column.name].drop_nulls().to_numpy().astype(np.float64)
        assert len(column.quantiles) == (NUM_QUANTILES if len(values) else 0)
        if len(values):
            np.testing.assert_array_equal(column.quantiles, np.quantile(values, np.linspace(0, 1, NUM_QUANTILES)))
            assert column.median == column.quantiles[NUM_QUANTILES // 2]


def test_every_training_row_is_encoded_to_finite_numbers() -> None:
    extremes = pl.DataFrame({"x": [3.4e38, -3.4e38, 1e-45, 0.0, None], "y": [1.0, 1 + 1e-7, 1.0, 1.0, 3e38]})
    encoded = features(fit(extremes), extremes)
    assert encoded.isfinite().all()
    assert encoded.dtype == torch.float32


@pytest.mark.parametrize("tiny", [1e-300, 5e-324])
def test_differences_below_float32_neither_overflow_nor_hide_the_range(tiny: float) -> None:
    """A scale of 1e300 would square to infinity in the smooth clipping."""
    frame = pl.DataFrame({"x": [0.0, 0.0, tiny, tiny, 1e30], "y": [0.0, tiny, 0.0, tiny, 0.0]})
    encoded = features(fit(frame), frame)
    np.testing.assert_allclose(encoded[:, 0], [0, 0, 0, 0, 2 / np.sqrt(1 + (2 / 3) ** 2)], rtol=1e-6)
    assert (encoded[:, 1] == 0).all()
    assert (features(fit(frame), pl.DataFrame({"x": [0.0], "y": [3e38]})) == 0).all()


def test_timestamps_a_second_apart_are_told_apart() -> None:
    """Near 1.7e9 float32 knows every 128th number only: rounded to it, this column would be a constant."""
    seconds = torch.arange(60, dtype=torch.float64)
    late = (seconds % 60 > 30).float()
    frame = pl.DataFrame({"t": (1.7e9 + seconds).numpy()})
    encoded = features(fit(frame), frame)[:, 0]
    assert encoded.unique().numel() == 60
    assert torch.equal((encoded > encoded[30]).float(), late)


def test_the_order_of_columns_and_further_columns_do_not_matter() -> None:
    frame = table()
    encoder = fit(frame)
    shuffled = frame.select(reversed(frame.columns)).with_columns(more=pl.lit("x"))
    assert torch.equal(features(encoder, shuffled), features(encoder, frame))


def test_a_row_is_encoded_the_same_alone_and_among_others() -> None:
    frame = table()
    encoder = fit(frame)
    together = features(encoder, frame)
    assert torch.equal(torch.cat([features(encoder, frame[i : i + 1]) for i in range(0, 301, 37)]), together[::37])
    assert features(encoder, frame[:0]).shape == (0, together.shape[1])


def test_it_is_the_same_after_saving_and_loading() -> None:
    frame = table()
    encoder = fit(frame)
    again = Encoder(FeatureSpec.from_json(json.loads(json.dumps(encoder.spec.to_json()))))
    assert again.spec == encoder.spec
    assert torch.equal(features(again, frame), features(encoder, frame))


def test_only_categories_and_only_numbers_are_tables_too() -> None:
    for names in (["purpose"], ["balance"]):
        frame = table().select(names)
        encoder = fit(frame)
        inputs = encoder.to_arrays(frame, "t")
        assert [x.shape[1] for x in inputs] == ([0, 0, 1] if names == ["purpose"] else [1, 0, 0])
        assert features(encoder, frame).shape == (301, 5 if names == ["purpose"] else 1)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(UserError, match=r"t: no column 'code' \(the model was trained on it\)"):
        features(fit(table()), table().drop("code"))


def test_a_column_of_another_type_is_named() -> None:
    encoder = fit(table())
    with pytest.raises(UserError, match="t: column 'balance', data row 1: 'x' is not a number"):
        features(encoder, table().with_columns(balance=pl.lit("x")))
    with pytest.raises(UserError, match="t: column 'balance' has type Date"):
        features(encoder, table().with_columns(balance=pl.date(2020, 1, 1)))
    with pytest.raises(UserError, match="t: column 'purpose' has type List"):
        features(encoder, table().with_columns(purpose=pl.concat_list("code")))


def _bad_cell_on_one_rank(collectives: Collectives) -> str:
    frame = pl.DataFrame({"x": ["1", "2", "3", "four"]})
    begin, end = split_evenly(0, 4, collectives.size)[collectives.rank]
    kinds = feature_kinds(pl.DataFrame({"x": [1.0]}), [], [])
    try:
        fit_spec(pieces_of(frame[begin:end]), kinds, ["a", "b"], collectives, max_categories=2, source="t")
    except UserError as error:
        return str(error)
    return "fitted"


def test_a_mistake_that_one_rank_finds_is_known_to_all() -> None:
    first, second = on_ranks(2, _bad_cell_on_one_rank)
    assert first == second
    assert "'four' is not a number" in first
