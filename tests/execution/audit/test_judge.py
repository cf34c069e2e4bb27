"""Who is named for what the ranks say."""

from __future__ import annotations

import pytest

from dist_train.execution.audit.judge import Statement, judge

GOOD, BAD, WORSE = "good", "bad", "worse"


def said(received: list[str], *computed: tuple[int, str], **more: object) -> Statement:
    """What a rank says of a step of one call, each rank of which has one slice."""
    again = [(whose, [[digest]]) for whose, digest in computed]
    return Statement(host="host", received=[received], computed=again, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("statements", "ranks", "certain"),
    [
        # One rank: the first, the second or the third computation is another one.
        ([said([BAD], (0, GOOD), (0, GOOD))], [0], True),
        ([said([GOOD], (0, BAD), (0, GOOD))], [0], True),
        # Two: rank 1 is computed by itself, by rank 0, by itself, by rank 0.
        ([said([GOOD, BAD], (1, GOOD), (0, GOOD), (1, GOOD)),
          said([GOOD, BAD], (0, GOOD), (1, GOOD), (0, GOOD))], [1], True),
        # Rank 0 has computed it wrongly once.
        ([said([GOOD, GOOD], (1, BAD), (0, GOOD), (1, GOOD)),
          said([GOOD, GOOD], (0, GOOD), (1, GOOD), (0, GOOD))], [0], True),
        # Each sticks to what it says: it may be either.
        ([said([GOOD, BAD], (1, GOOD), (0, GOOD), (1, GOOD)),
          said([GOOD, BAD], (0, BAD), (1, BAD), (0, BAD))], [0, 1], False),
        # As before; rank 0 no longer computes what it did when both agreed.
        ([said([GOOD, BAD], (1, GOOD), (0, GOOD), (1, GOOD), unlike_before=True),
          said([GOOD, BAD], (0, BAD), (1, BAD), (0, BAD))], [0], True),
        # Rank 0 has read wrongly what rank 1 sent.
        ([said([GOOD, BAD], (1, GOOD), (0, GOOD), (1, GOOD)),
          said([GOOD, GOOD], (0, GOOD), (1, GOOD), (0, GOOD))], [0], True),
        # Three: rank 2 is wrong always, of its own slice and of that of rank 0.
        ([said([GOOD, GOOD, BAD], (1, GOOD), (2, GOOD)), said([GOOD, GOOD, BAD], (2, GOOD), (0, GOOD)),
          said([GOOD, GOOD, BAD], (0, BAD), (1, BAD))], [2], True),
        # Rank 1 alone has received something else.
        ([said([GOOD] * 3, (1, GOOD), (2, GOOD)), said([GOOD, GOOD, BAD], (2, GOOD), (0, GOOD)),
          said([GOOD] * 3, (0, GOOD), (1, GOOD))], [1], True),
        # Rank 2 has sent something else to all others.
        ([said([GOOD, GOOD, BAD], (1, GOOD), (2, GOOD)), said([GOOD, GOOD, BAD], (2, GOOD), (0, GOOD)),
          said([GOOD] * 3, (0, GOOD), (1, GOOD))], [2], True),
        # Three that all differ.
        ([said([GOOD, GOOD, BAD], (1, GOOD), (2, GOOD)), said([GOOD, GOOD, BAD], (2, WORSE), (0, GOOD)),
          said([GOOD, GOOD, BAD], (0, GOOD), (1, GOOD))], [0, 1, 2], False),
    ],
)  # fmt: skip
def test_a_slice_that_differs(statements: list[Statement], ranks: list[int], certain: bool) -> None:
    verdict = judge(statements)
    assert verdict is not None
    assert (verdict.ranks, verdict.certain) == (ranks, certain)
    assert verdict.what.startswith("the gradient of slice ")


def test_what_all_hold_alike() -> None:
    honest = [said([GOOD] * 3, state={"weights": GOOD}, sums=GOOD, sums_again=GOOD)] * 2
    assert judge([*honest, honest[0]]) is None
    weights = judge([*honest, said([GOOD] * 3, state={"weights": BAD}, sums=GOOD, sums_again=GOOD)])
    assert weights is not None
    assert (weights.ranks, weights.what) == ([2], "its weights are not those of the other ranks")
    two = judge([honest[0], said([GOOD] * 3, state={"weights": BAD})])
    assert two is not None
    assert (two.ranks, two.certain) == ([0, 1], False)


def test_sums() -> None:
    honest = [said([GOOD] * 3, sums=GOOD, sums_again=GOOD)] * 2
    for sums, again in ((BAD, GOOD), (BAD, BAD)):
        verdict = judge([*honest, said([GOOD] * 3, sums=sums, sums_again=again)])
        assert verdict is not None
        assert verdict.ranks == [2]


def test_causes_come_before_effects() -> None:
    """What a rank computes with wrong weights is wrong as well."""
    statements = [
        said([BAD, GOOD], (1, GOOD), (0, GOOD), (1, GOOD)),
        said([BAD, GOOD], (0, GOOD), (1, GOOD), (0, GOOD), alarm=["weights"]),
    ]
    verdict = judge(statements)
    assert verdict is not None
    assert (verdict.ranks, verdict.what) == ([1], "memory has changed that nobody wrote to: weights")


def test_a_difference_that_is_gone() -> None:
    verdict = judge([said([GOOD, GOOD]), said([GOOD, GOOD], objects=True)])
    assert verdict is not None
    assert (verdict.ranks, verdict.certain) == ([1], False)
