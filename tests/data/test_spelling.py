"""One text for each value of a category, whichever type and program wrote it."""

from __future__ import annotations

from collections import Counter

import pytest

from dist_train.data.cells.spelling import alike, canonical_boolean, canonical_moment, canonical_number, form_of, merged


@pytest.mark.parametrize(
    ("spellings", "canonical"),
    [
        (["1.5", "1.50", "15e-1", "+1.5", "01.5", " 1.5", "0.15E+1"], "1.5"),
        (["0", "-0.0", "0.000", "0e5"], "0"),
        (["100000000000000000000", "1e20", "1E+20", "100000000000000000000.0"], "100000000000000000000"),
        (["18446744073709551615", "18446744073709551615.0"], "18446744073709551615"),
        (["0.0000001", "1e-7", ".0000001"], "0.0000001"),
        (["1e300", "1.0E+300"], "1e+300"),
    ],
)
def test_a_number_has_one_text(spellings: list[str], canonical: str) -> None:
    assert {canonical_number(text) for text in spellings} == {canonical}


@pytest.mark.parametrize("text", ["", "x", "1.2.3", "1e", "0x10", "inf", "nan", "1_000", "1e9999999"])
def test_other_texts_are_no_numbers(text: str) -> None:
    assert canonical_number(text) is None


def test_a_truth_has_one_text() -> None:
    assert [canonical_boolean(text) for text in ["true", "T", "1", "1.0"]] == ["true"] * 4
    assert [canonical_boolean(text) for text in ["False", "f", "0"]] == ["false"] * 3
    assert [canonical_boolean(text) for text in ["2", "yes"]] == [None] * 2


@pytest.mark.parametrize(
    ("spellings", "canonical"),
    [
        (["2020-01-31", "2020-01-31 00:00:00", "2020-01-31T00:00:00.000000"], "2020-01-31"),
        (["2020-01-31 12:30", "2020-01-31T12:30:00.000"], "2020-01-31 12:30:00"),
        (["2020-01-31 00:00:00.5", "2020-01-31 00:00:00.500000"], "2020-01-31 00:00:00.5"),
        (
            ["2020-01-31T07:00:00Z", "2020-01-31 07:00:00 UTC", "2020-01-31 12:30:00+05:30", "2020-01-31 08:00+0100"],
            "2020-01-31 07:00:00 UTC",
        ),
    ],
)
def test_a_date_and_a_time_have_one_text(spellings: list[str], canonical: str) -> None:
    assert {canonical_moment(text) for text in spellings} == {canonical}


def test_texts_are_compared_as_values_only_where_all_categories_are_values_of_a_kind() -> None:
    assert merged(Counter({"1.50": 2, "1.5": 3, None: 1})) == Counter({"1.5": 5, None: 1})
    versions = Counter({"1.10": 2, "1.1": 3, "1.1.0": 1})
    assert merged(versions) == versions
    postcodes = Counter({"02413": 2, "2413": 3})
    assert merged(postcodes) == postcodes
    assert [form_of(words) for words in (["a"], [])] == [None] * 2


def test_a_text_that_could_mean_two_categories_means_neither() -> None:
    assert alike(["1.500"], ["1.5", "1.50"], typed=False) == {}
    assert alike(["02413 "], ["2413"], typed=False) == {"02413 ": 0}


def test_a_number_in_its_file_is_compared_as_one_beside_other_categories_too() -> None:
    assert alike(["1.5"], ["1.50", "other"], typed=True) == {"1.5": 0}
    assert alike(["1.5"], ["1.50", "other"], typed=False) == {}
