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
    """One rank at the end of a run, as it said itself (`answered`) or as another rank of its host found it.

    `process` is its number, `process_state` what has become of it. `activity` None: nobody could read its heartbeat.
    `error` is a traceback; `lost_connection`: it is that of a collective which could not be completed;
    `launcher_died`: torchrun is gone.
    """

    rank: int
    host: str
    process: int
    activity: RankState | None = None
    process_state: State = "unknown"
    answered: bool = False
    error: str | None = None
    lost_connection: bool = False
    launcher_died: bool = False

    @property
    def crash(self) -> str | None:
        """What the interpreter called the crash that ended the process, None: it did not crash."""
        found = re.search("^Fatal Python error: (.*)$", self.activity.stack if self.activity else "", re.MULTILINE)
        return found.group(1) if found else None

    @property
    def waits(self) -> bool:
        """Whether it was in a collective."""
        return self.activity is not None and self.activity.collective is not None


@dataclass(frozen=True)
class Verdict:
    """The ranks to blame, in order, and what each has done."""

    blamed: dict[int, str]


def diagnose(ranks: Sequence[RankReport], *, timed_out: bool) -> Verdict:
    """Who is to blame. Causes come before effects: a rank that waits in vain, or loses a connection, is an effect.

    `timed_out`: the watchdog of a rank that had waited too long has tripped; otherwise ranks may be anywhere.
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
        parts += [f"--- {_place(r)}: {r.process_state}{'' if r.answered else ', has not answered'}"]
        if r.activity:
            where = f"waits in {r.activity.collective}" if r.waits else "in no collective"
            parts += [f"{where} for {_seconds(r)}; {r.activity.count} collectives so far, the last of them:"]
            parts += [f"  {name}" for name in r.activity.history[-8:]]
        if r.error:
            parts += [r.error.rstrip()]
        if r.activity and r.activity.stack:
            parts += [r.activity.stack.rstrip()]
        parts += [""]
    return "\n".join(parts)


def _place(r: RankReport) -> str:
    name = f"rank {r.rank} (host {r.host}, process {r.process})"
    if r.activity is None:
        return name
    step = "" if r.activity.step is None else f", step {r.activity.step}"
    return f"{name} in {r.activity.phase}{step}"


def _seconds(r: RankReport) -> str:
    return f"{r.activity.seconds:.1f} s" if r.activity else "?"


def _last_line(error: str | None) -> str:
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else "?"


def _silence(r: RankReport) -> str:
    return {
        "running": "does not answer: it hangs where the interpreter cannot run",
        "stopped": "is stopped (SIGSTOP)",
        "gone": "is gone: killed, or ended by somebody else",
        "unknown": "does not answer: its process is gone, or its host cannot be reached",
    }[r.process_state]


def _out_of_step(ranks: Sequence[RankReport]) -> dict[int, str]:
    """Ranks that wait in another collective than the others: those that are ahead have skipped one.

    Where the two largest groups cannot be told apart, the ranks of both are named.
    """
    waits = {r.rank: r.activity for r in ranks if r.activity and r.waits}
    where = {rank: (activity.count, activity.collective) for rank, activity in waits.items()}
    groups = Counter(where.values()).most_common()
    if len(groups) < 2:
        return {}
    members = [[rank for rank in where if where[rank] == place] for place, _ in groups]
    if groups[0][1] > groups[1][1]:
        ahead = [rank for rank in where if rank not in members[0]]
    else:
        further = _further(waits[members[0][0]], waits[members[1][0]])
        if further is None:
            both = f"ranks {_listed(members[0])} and {_listed(members[1])} wait in different collectives: "
            both += f"{groups[0][0][1]}; {groups[1][0][1]}"
            return dict.fromkeys(sorted(members[0] + members[1]), both)
        ahead = members[further]
    others = next((place[1] for rank, place in where.items() if rank not in ahead), "another")
    return {
        rank: f"is out of step: it waits in {where[rank][1]}, the others in {others}; it has skipped a collective"
        for rank in ahead
    }


def _listed(group: Sequence[int]) -> str:
    named = ", ".join(str(rank) for rank in group[:_MAX_NAMED])
    more = f" and {len(group) - _MAX_NAMED} more" if len(group) > _MAX_NAMED else ""
    return named + more


def _further(a: RankState, b: RankState) -> int | None:
    """Of two ranks in different collectives the one that is further in the program, 0 or 1; None: it cannot be told."""
    orders = (
        (a.step or 0) - (b.step or 0),
        a.count - b.count,  # it counted the call that it made in vain
        _strays(a, b) - _strays(b, a),
        _lines_between(b, a),
    )
    return next((0 if order > 0 else 1 for order in orders if order), None)


def _strays(one: RankState, other: RankState) -> int:
    """1 when the collective that a rank waits in does not follow, as it used to, on those before; else 0."""
    *before, last = one.history
    for length in range(min(len(before), 12), 0, -1):
        context = before[-length:]
        for history in (before, list(other.history[:-1])):
            follows = [history[i + length] for i in range(len(history) - length) if history[i : i + length] == context]
            if follows:
                return int(last not in follows)
    return 0


def _lines_between(a: RankState, b: RankState) -> int:
    """Lines from the collective of `a` to that of `b` in one function; 0 in different ones, whose lines say nothing."""
    places = [re.search(r" in (\S+), line (\d+)$", state.collective or "") for state in (a, b)]
    if not all(places):
        return 0
    (of_a, line_a), (of_b, line_b) = (place.groups() for place in places if place)
    return int(line_b) - int(line_a) if of_a == of_b else 0
