"""What every rank was doing when a run broke -> which rank is to blame, and the report of it. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dist_train.watchdog.heartbeat import RankState
from dist_train.watchdog.processes import State

_MAX_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank at the end of a run, as it said itself (`answered`) or as others of its host found it.

    `reading` None: nobody could look. `error` is a traceback, `lost_connection`: of a collective that could not be
    completed; `launcher_died`: torchrun is gone.
    """

    rank: int
    host: str
    process: int
    reading: RankState | None = None
    state: State = "unknown"
    answered: bool = False
    error: str | None = None
    lost_connection: bool = False
    launcher_died: bool = False

    @property
    def crash(self) -> str | None:
        """What the interpreter called the crash that ended the process, None: it did not crash."""
        found = re.search("^Fatal Python error: (.*)$", self.reading.stack if self.reading else "", re.MULTILINE)
        return found.group(1) if found else None

    @property
    def waits(self) -> bool:
        """Whether it was in a collective."""
        return self.reading is not None and self.reading.collective is not None


@dataclass(frozen=True)
class Verdict:
    """The ranks to blame, in order, and what each has done."""

    blamed: dict[int, str]


def diagnose(ranks: Sequence[RankReport], *, timed_out: bool) -> Verdict:
    """Who is to blame. Causes come before effects: a rank that waits in vain, or loses a connection, is an effect.

    `timed_out`: the alarm was raised by a rank that had waited too long; otherwise ranks may be anywhere.
    """
    launchers = {r.rank: "its launcher (torchrun) has died" for r in ranks if r.launcher_died}
    failed = {r.rank: f"failed: {_last_line(r.error)}" for r in ranks if r.error and not r.lost_connection}
    silent = {r.rank: _silence(r) for r in ranks if not r.answered and not r.crash}
    busy = [r for r in ranks if timed_out and r.answered and not r.waits]
    stalled = {r.rank: f"has not come to the collective in which the others wait for {_seconds(r)}" for r in busy}
    crashed = {r.rank: f"crashed: {r.crash}" for r in ranks if r.crash}
    lost = {r.rank: f"failed in a collective: {_last_line(r.error)}" for r in ranks if r.error}
    for blamed in (launchers, failed, silent, stalled, _out_of_step(ranks), crashed, lost):
        if blamed:
            return Verdict(blamed)
    return Verdict({})


def headline(ranks: Sequence[RankReport], verdict: Verdict) -> str:
    """The verdict: a line for each thing that was done, with the ranks that did it."""
    known = {r.rank: r for r in ranks}
    alike: dict[str, list[int]] = {}
    for rank, what in verdict.blamed.items():
        alike.setdefault(what, []).append(rank)
    lines = []
    for what, group in alike.items():
        more = f" (and {len(group) - _MAX_NAMED} more ranks)" if len(group) > _MAX_NAMED else ""
        lines.append(f"{'; '.join(_place(known[rank]) for rank in group[:_MAX_NAMED])}{more}: {what}")
    return "\n".join(lines) or "no rank can be blamed: all wait in the same collective, the network may be at fault"


def report(ranks: Sequence[RankReport], verdict: Verdict, title: str) -> str:
    """The whole report as text: the verdict, then every rank with its last collectives and its stacks."""
    parts = [title, headline(ranks, verdict), ""]
    for r in ranks:
        parts += [f"--- {_place(r)}: {r.state}{'' if r.answered else ', has not answered'}"]
        if r.reading:
            where = f"waits in {r.reading.collective}" if r.waits else "in no collective"
            parts += [f"{where} for {_seconds(r)}; {r.reading.count} collectives so far, the last of them:"]
            parts += [f"  {name}" for name in r.reading.history[-8:]]
        if r.error:
            parts += [r.error.rstrip()]
        if r.reading and r.reading.stack:
            parts += [r.reading.stack.rstrip()]
        parts += [""]
    return "\n".join(parts)


def _place(r: RankReport) -> str:
    name = f"rank {r.rank} (host {r.host}, process {r.process})"
    if r.reading is None:
        return name
    step = "" if r.reading.step is None else f", step {r.reading.step}"
    return f"{name} in {r.reading.phase}{step}"


def _seconds(r: RankReport) -> str:
    return f"{r.reading.seconds:.1f} s" if r.reading else "?"


def _last_line(error: str | None) -> str:
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else "?"


def _silence(r: RankReport) -> str:
    return {
        "running": "does not answer: it hangs where the interpreter cannot run",
        "stopped": "is stopped (SIGSTOP)",
        "gone": "is gone: killed, or ended by somebody else",
        "unknown": "does not answer: its process is gone, or its host cannot be reached",
    }[r.state]


def _out_of_step(ranks: Sequence[RankReport]) -> dict[int, str]:
    """Ranks that wait in another collective than the others: those that are ahead have skipped one."""
    where = {r.rank: (r.reading.count, r.reading.collective) for r in ranks if r.reading and r.waits}
    groups = Counter(where.values()).most_common()
    if len(groups) < 2:
        return {}
    if groups[0][1] > groups[1][1]:
        ahead = [rank for rank, place in where.items() if place != groups[0][0]]
    else:
        ahead = _further(
            [next(r for r in ranks if r.rank in where and where[r.rank] == place) for place, _ in groups[:2]]
        )
        ahead = [rank for rank, place in where.items() if place in {where[a] for a in ahead}]
    others = next((place[1] for rank, place in where.items() if rank not in ahead), "another")
    return {
        rank: f"is out of step: it waits in {where[rank][1]}, the others in {others}; it has skipped a collective"
        for rank in ahead
    }


def _further(two: list[RankReport]) -> list[int]:
    """Of two ranks in different collectives, the one that is further in the program; both when it cannot be told."""
    a, b = (r.reading for r in two if r.reading)
    orders = (
        (a.step or 0) - (b.step or 0),
        a.count - b.count,  # it counted the call that it made in vain
        _strays(a, b) - _strays(b, a),
        _line(a) - _line(b),
    )
    for order in orders:
        if order:
            return [two[0].rank if order > 0 else two[1].rank]
    return [r.rank for r in two]


def _strays(reading: RankState, other: RankState) -> int:
    """1 when the collective that a rank waits in does not follow, as it used to, on those before; else 0."""
    *before, last = reading.history
    for length in range(min(len(before), 12), 0, -1):
        context = before[-length:]
        for history in (before, list(other.history[:-1])):
            follows = [history[i + length] for i in range(len(history) - length) if history[i : i + length] == context]
            if follows:
                return int(last not in follows)
    return 0


def _line(reading: RankState) -> int:
    found = re.search(r", line (\d+)$", reading.collective or "")
    return int(found.group(1)) if found else 0
