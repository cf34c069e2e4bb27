"""Who is to blame: causes before effects, for any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.watchdog.diagnosis import RankReport, diagnose, headline, report
from dist_train.watchdog.heartbeat import RankState

SUM = "all_reduce in a.step, line 10"
GATHER = "all_gather in a.step, line 20"
STEP = (GATHER, SUM)


def reading(*history: str, waits: bool = True, step: int = 3, count: int | None = None, stack: str = "") -> RankState:
    return RankState(
        phase="training",
        step=step,
        collective=history[-1] if waits else None,
        seconds=30.0,
        count=len(history) if count is None else count,
        history=history,
        stack=stack,
    )


def waiting(rank: int, **more: Any) -> RankReport:
    return RankReport(
        **{
            "rank": rank, "host": "a", "process": 100 + rank, "activity": reading(*STEP * 3),
            "process_state": "running", "answered": True,
        } | more
    )  # fmt: skip


def blamed(*ranks: RankReport, timed_out: bool = True) -> dict[int, str]:
    return diagnose(ranks, timed_out=timed_out).blamed


SILENT = {"answered": False}
ABSENT = {"answered": False, "process_state": "gone"}
LOST = {"error": "RuntimeError: Connection closed by peer", "lost_connection": True}
BUSY = {"activity": reading(*STEP * 3, waits=False)}
FURTHER = reading(*STEP * 3, GATHER)
CRASH = reading(*STEP * 3, stack="Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):")


@pytest.mark.parametrize(
    ("others", "culprit", "what"),
    [
        ({}, {"launcher_died": True}, "its launcher (torchrun) has died"),
        (LOST, {"error": "Traceback ...\nValueError: no"}, "failed: ValueError: no"),
        (LOST, ABSENT, "is gone: killed, or ended by somebody else"),
        ({}, {"answered": False, "process_state": "stopped"}, "is stopped (SIGSTOP)"),
        (
            {},
            {"answered": False, "process_state": "running"},
            "does not answer: it hangs where the interpreter cannot run",
        ),
        (
            {},
            {"answered": False, "process_state": "unknown", "activity": None},
            "does not answer: its process is gone, or its",
        ),
        ({}, BUSY, "has not come to the collective in which the others wait for 30.0 s"),
        ({}, {"activity": FURTHER}, "it has skipped a collective"),
        (LOST, ABSENT | {"activity": CRASH}, "crashed: Aborted"),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3, 64])
def test_one_culprit(others: dict[str, Any], culprit: dict[str, Any], what: str, world_size: int) -> None:
    for rank in {0, 1, world_size - 1}:
        ranks = [waiting(r, **(culprit if r == rank else others)) for r in range(world_size)]
        found = blamed(*ranks)
        assert list(found) == [rank]
        assert what in found[rank]


def test_away_from_collectives_is_no_guilt_when_a_connection_was_lost() -> None:
    ranks = waiting(0, **LOST), waiting(1, **BUSY), waiting(2, **ABSENT)
    assert list(blamed(*ranks, timed_out=False)) == [2]


def test_an_innocent_rank_that_gloo_aborts_is_not_blamed() -> None:
    # Rank 1 skipped a sum: its gather reaches rank 0 in the middle of the sum, and gloo aborts rank 0.
    aborted = waiting(0, answered=False, process_state="gone", activity=CRASH)
    ahead = waiting(1, activity=FURTHER, **LOST)
    assert list(blamed(aborted, ahead, timed_out=False)) == [1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (reading(*STEP * 3, GATHER, step=3), reading(*STEP * 3, GATHER, SUM, step=4)),  # a step further
        (reading(*STEP * 3, count=9), reading(*STEP * 3, GATHER, count=10)),  # the call it made in vain was counted
        (reading(*STEP * 3, GATHER, count=7), reading(*STEP * 3, SUM, count=7)),  # SUM never came after SUM before
        (reading("x in a.f, line 3", count=1), reading("y in a.f, line 7", count=1)),  # further down in the program
    ],
)
def test_of_two_ranks_the_one_ahead_has_skipped(one: RankState, other: RankState) -> None:
    assert list(blamed(waiting(0, activity=one), waiting(1, activity=other))) == [1]
    assert list(blamed(waiting(0, activity=other), waiting(1, activity=one))) == [0]


@pytest.mark.parametrize("other", ["y in b.f, line 3", "y in b.f, line 900", "y in a.g, line 900", "y in a.f, line 3"])
def test_where_it_cannot_be_told_both_are_named(other: str) -> None:
    """Lines of different modules, or of different functions, say nothing of who is further."""
    apart = [reading("x in a.f, line 3", count=1), reading(other, count=1)]
    ranks = [waiting(r, activity=apart[r]) for r in range(2)]
    both = f"ranks 0 and 1 wait in different collectives: x in a.f, line 3; {other}"
    assert blamed(*ranks) == {0: both, 1: both}
    assert headline(ranks, diagnose(ranks, timed_out=True)).endswith(f": {both}")


def test_where_nobody_is_out_of_step_none_is_named() -> None:
    nobody = [waiting(r) for r in range(4)]
    assert blamed(*nobody) == {}
    assert headline(nobody, diagnose(nobody, timed_out=True)).startswith("no rank can be blamed")


def test_many_ranks_with_one_fault_are_one_line() -> None:
    ranks = [waiting(r, error="Traceback ...\nValueError: no") for r in range(64)]
    said = headline(ranks, diagnose(ranks, timed_out=False))
    assert said.count("\n") == 0
    assert said.startswith("rank 0 (host a, process 100) in training, step 3; rank 1")
    assert said.endswith("(and 60 more ranks): failed: ValueError: no")


def test_the_report_has_every_rank() -> None:
    ranks = [waiting(0), waiting(1, host="b", activity=reading(*STEP, waits=False, stack="Thread 0x7: sleeping"))]
    text = report(ranks, diagnose(ranks, timed_out=True), "=== today")
    lines = text.splitlines()
    assert lines[:2] == [
        "=== today",
        "rank 1 (host b, process 101) in training, step 3: has not come to the collective in which the others wait for "
        "30.0 s",
    ]
    assert "--- rank 0 (host a, process 100) in training, step 3: running" in lines
    assert f"waits in {SUM} for 30.0 s; 6 collectives so far, the last of them:" in lines
    assert "Thread 0x7: sleeping" in lines
