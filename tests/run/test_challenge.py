"""The arithmetic of a challenge: windows, draws, and how often an altered one is found."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb, sqrt
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.run.verification.challenge import Challenge, detection_probability, draw, windows_between

STEPS, EVERY = 10_000, 100


@given(starts=st.sets(st.integers(0, 50), min_size=1), more=st.integers(1, 30))
def test_windows_have_each_step_once(starts: set[int], more: int) -> None:
    last = max(starts) + more
    windows = windows_between(sorted(starts), last)
    assert [step for start, end in windows for step in range(start + 1, end + 1)] == list(
        range(min(starts) + 1, last + 1)
    )
    assert {start for start, _ in windows} == starts


def test_a_draw_is_a_function_of_the_seed_and_has_each_window_once() -> None:
    windows = windows_between(range(0, STEPS, EVERY), STEPS)
    drawn = draw(windows, 12, seed=3)
    assert drawn == draw(list(reversed(windows)), 12, seed=3)
    assert drawn != draw(windows, 12, seed=4)
    assert len(set(drawn)) == 12
    assert drawn == sorted(drawn)
    assert draw(windows, 1000, seed=3) == windows


def test_every_pair_of_windows_is_drawn_equally_often() -> None:
    windows = [(step, step + 1) for step in range(5)]
    draws = 5_000
    counts = Counter(tuple(draw(windows, 2, seed)) for seed in range(draws))
    pairs = list(combinations(windows, 2))
    expected = draws / len(pairs)
    assert sum((counts[pair] - expected) ** 2 / expected for pair in pairs) < 33.7  # chi-squared, 9 degrees: p = 1e-4


@given(windows=st.integers(1, 12), data=st.data())
def test_the_probability_is_that_of_counting(windows: int, data: st.DataObject) -> None:
    altered, drawn = data.draw(st.integers(0, windows)), data.draw(st.integers(1, windows))
    found = sum(any(place < altered for place in places) for places in combinations(range(windows), drawn))
    assert detection_probability(windows, altered, drawn) == pytest.approx(Fraction(found, comb(windows, drawn)))


@pytest.mark.parametrize("count", [1, 5, 20, 50, 99, 100])
def test_one_altered_step_of_10_000_is_found_as_often_as_is_said(count: int) -> None:
    """Simulated: in each of 1,000 runs one random step is altered, in one of 100 windows, and a random seed draws."""
    runs, random = 1_000, Random(count)
    windows = windows_between(range(0, STEPS, EVERY), STEPS)
    found, said = 0, Challenge.of(windows, count, 0).probability
    assert said == pytest.approx(min(count, 100) / 100)
    for _ in range(runs):
        step = random.randint(1, STEPS)
        found += any(start < step <= end for start, end in draw(windows, count, random.getrandbits(32)))
    assert abs(found / runs - said) <= 4 * sqrt(said * (1 - said) / runs)
