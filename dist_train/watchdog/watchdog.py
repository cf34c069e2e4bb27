"""When one rank fails, hangs or vanishes: every rank ends soon, and one report says which rank, where and why.

A thread on each rank looks twice a second whether this rank has waited in a collective for longer than the timeout, and
whether the watchdog of another rank has tripped. The first one that trips collects the reports of all ranks
(`watchdog/heartbeat.py`), finds out which rank is to blame (`watchdog/diagnosis.py`), writes the report and prints the
verdict; the others print nothing. This package imports the standard library and torch alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from dist_train.watchdog.diagnosis import RankReport, Verdict, diagnose, headline, report
from dist_train.watchdog.heartbeat import STACK_SIGNAL, Heartbeat, RankState, read
from dist_train.watchdog.processes import Process
from dist_train.watchdog.running_time import RunningTime

T = TypeVar("T")

_LOOK_SECONDS = 0.5
# To publish a report; to hear from all others; to close files and connections once the report is written.
_ASK_SECONDS = 2.0
_ASK_TURNS = 20
# A pause of which the user is told; native code that imports a library can make the thread late by some seconds.
_TOLD_SECONDS = 10.0
_COLLECT_SECONDS = 3.0
_LEAVE_SECONDS = 2.0
_MAX_FLIGHT = 20_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run is watched.

    A rank that waits in a collective for longer than `timeout_seconds` trips its watchdog, and every rank ends with
    `exit_code`. The report is appended to `report_file` under `title`; None: it goes to stderr. `launcher_died` says
    whether the launcher of this process is gone; None: it has none. An exception of the types `passed` leaves the block
    as it is. One of the types `effects` ends every rank, but has its cause elsewhere: this rank is not blamed for it.
    Time in which this process was suspended does not count; `paused` is told the seconds of the first such pause.
    """

    timeout_seconds: float
    exit_code: int
    report_file: Path | None = None
    title: str = ""
    launcher_died: Callable[[], bool] | None = None
    passed: tuple[type[Exception], ...] = ()
    effects: tuple[type[Exception], ...] = ()
    paused: Callable[[float], None] = lambda _seconds: None


Share = Callable[[object], Sequence[Any]]
"""Collective: every rank's object, in rank order, on all ranks."""


@contextmanager
def watched(rank: int, heartbeat: Heartbeat, store: Store, share: Share, settings: Settings) -> Iterator[None]:
    """Watch over the ranks inside the block. Called by all of them.

    `heartbeat` is this rank's, `store` the one that all ranks share. Any exception that `settings` does not let pass,
    on any rank, ends every rank; in a world of one it is raised as it is.

    Raises:
        SystemExit: this rank has failed, and the report is written.
    """
    watchdog = Watchdog(rank, heartbeat, store, share, settings)
    watchdog.start()
    try:
        yield
    except settings.effects as error:
        watchdog.fail(error)
    except settings.passed:
        raise
    except Exception as error:
        if watchdog.alone:  # nobody waits: the traceback says it all
            raise
        watchdog.fail(error)
    finally:
        watchdog.end()


class Watchdog:
    """The watchdog of one rank."""

    def __init__(self, rank: int, heartbeat: Heartbeat, store: Store, share: Share, settings: Settings) -> None:
        self._rank = rank
        self._heartbeat = heartbeat
        self._store: Store | None = _own_connection(store)
        self._settings = settings
        self._ended = threading.Event()
        self._tripped = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        handles, self._ranks = zip(*share((heartbeat.handle, Process.of(os.getpid()))), strict=True)
        self._neighbours = {
            other: who.open_file(handles[other], os.O_RDONLY) for other, who in self._of_this_host().items()
        }
        self._woken: set[int] = set()
        self.alone = len(self._ranks) == 1
        share(None)  # nobody leaves before its memory has been opened

    def _of_this_host(self) -> dict[int, Process]:
        host = self._ranks[self._rank].host
        return {rank: who for rank, who in enumerate(self._ranks) if rank != self._rank and who.host == host}

    def start(self) -> None:
        """Start the thread."""
        if not self.alone:
            self._heartbeat.keep_stacks()
            self._thread.start()

    def end(self) -> None:
        """Stop the thread."""
        self._ended.set()
        for handle in self._neighbours.values():
            if handle is not None:
                with suppress(OSError):
                    os.close(handle)
        self._neighbours = {}

    def fail(self, error: Exception) -> NoReturn:
        """This rank cannot go on. Raises SystemExit once the report has been written."""
        if not self._tripped.acquire(blocking=False):
            self._thread.join()  # it has tripped, and ends this process
        self._trip(timed_out=False, error=None if isinstance(error, self._settings.effects) else error)
        code = self._settings.exit_code
        threading.Thread(target=_leave_after, args=(_LEAVE_SECONDS, code), daemon=True).start()
        raise SystemExit(code)

    def _watch(self) -> None:
        """The thread."""
        running, timeout, told = RunningTime(_LOOK_SECONDS), self._settings.timeout_seconds, False
        orphaned_at = None
        while not self._ended.wait(_LOOK_SECONDS):
            paused = running.look()
            if paused > _TOLD_SECONDS and not told:
                told = True
                self._settings.paused(paused)
            own = self._heartbeat.read()
            waited = own.collective is not None and running.of_the_last(own.seconds) > timeout
            if orphaned_at is None and self._launcher_died():
                orphaned_at = time.monotonic()
            # An orphan ends by itself at the next step; unless it hangs.
            orphaned = orphaned_at is not None and running.of_the_last(time.monotonic() - orphaned_at) > timeout
            if (waited or orphaned or self._another_has_tripped()) and self._tripped.acquire(blocking=False):
                self._trip(timed_out=waited, error=None)
                os._exit(self._settings.exit_code)

    def _launcher_died(self) -> bool:
        return self._settings.launcher_died is not None and self._settings.launcher_died()

    def _another_has_tripped(self) -> bool:
        return bool(self._ask(lambda store: store.check(["tripped"])))

    def _trip(self, *, timed_out: bool, error: Exception | None) -> None:
        """Publish this rank's report; the first rank that gets here collects those of the others."""
        self._heartbeat.dump_stacks()
        self._heartbeat.keep(_nccl_flight())
        mine = self._own_report(error)
        unresponsive = self._unresponsive() if self._reports_for_its_host() else []
        first = self._ask(lambda store: store.add("tripped", 1)) == 1
        self._ask(lambda store: store.set(f"rank{self._rank}", _packed([mine, *unresponsive])))
        if first or (self._store is None and self._reports_for_its_host()):
            self._collect(mine, unresponsive, timed_out=timed_out)
            return
        deadline = time.monotonic() + _COLLECT_SECONDS + _ASK_SECONDS
        while time.monotonic() < deadline and not self._ask(lambda store: store.check(["reported"])):
            time.sleep(0.1)
        self._end_neighbours()

    def _collect(self, mine: RankReport, unresponsive: list[RankReport], *, timed_out: bool) -> None:
        heard = {mine.rank: mine}
        found = {other.rank: other for other in unresponsive}
        deadline = time.monotonic() + _COLLECT_SECONDS
        while self._store and not self._all_heard(set(heard | found)) and time.monotonic() < deadline:
            for rank in range(len(self._ranks)):
                if rank not in heard and self._ask(lambda store, rank=rank: store.check([f"rank{rank}"])):  # type: ignore[misc]
                    said = self._ask(lambda store, rank=rank: store.get(f"rank{rank}"))  # type: ignore[misc]
                    if said:
                        heard[rank], *others = _unpacked(said)
                        found |= {other.rank: other for other in others}
            time.sleep(0.1)
        found = {other.rank: other for other in self._unresponsive(but=set(heard | found))} | found
        unknown = {r: RankReport(rank=r, host=w.host, process=w.number) for r, w in enumerate(self._ranks)}
        # A rank that was stopped may have said something when it was woken for its stacks: too late.
        found = {rank: other for rank, other in found.items() if rank not in heard or other.process_state == "stopped"}
        ranks = list((unknown | heard | found).values())
        verdict = diagnose(ranks, timed_out=timed_out)
        self._publish(ranks, verdict)
        self._ask(lambda store: store.set("reported", "1"))
        self._end_neighbours()

    def _all_heard(self, heard: set[int]) -> bool:
        """Whether nobody is left who could still say something."""
        gone = {rank for rank, who in self._of_this_host().items() if who.state() == "gone"}
        return len(heard | gone) == len(self._ranks)

    def _publish(self, ranks: list[RankReport], verdict: Verdict) -> None:
        # Where a cable is cut, each side blames the other: the reader must know whose report it is.
        reporter = f"told by rank {self._rank} (host {self._ranks[self._rank].host})"
        title = f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {self._settings.title}".rstrip()
        whole = report(ranks, verdict, f"{title}, {reporter}")
        said = headline(ranks, verdict)
        where, file = "", self._settings.report_file
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as stream:
                    stream.write(whole)
                where = f"every rank's stack: {file}"
            except OSError as error:
                where = f"{file} cannot be written ({error.strerror}):\n{whole}"
        errors = [r.error for r in ranks if r.rank in verdict.blamed and r.error and not r.launcher_died]
        with suppress(OSError):  # the terminal was closed
            print(_escaped("\n".join([f"error: {said}", *errors[:1], where or whole])), file=sys.stderr, flush=True)

    def _own_report(self, error: Exception | None) -> RankReport:
        who = self._ranks[self._rank]
        return RankReport(
            rank=self._rank, host=who.host, process=who.number, process_state="running",
            activity=self._heartbeat.read(), answered=True,
            error="".join(traceback.format_exception(error)) if error else None,
            lost_connection=error is not None and _is_of_communication(error), launcher_died=self._launcher_died(),
        )  # fmt: skip

    def _reports_for_its_host(self) -> bool:
        """Whether this rank reports for the unresponsive ones of its host. One does: a look may wake them."""
        return all(rank > self._rank for rank, who in self._of_this_host().items() if who.state() == "running")

    def _unresponsive(self, but: set[int] | None = None) -> list[RankReport]:
        """Ranks of this host that cannot speak for themselves: gone, or stopped; with `but`, all except those.

        Where the store is lost nobody could answer: what a running rank has in its memory is taken for its answer.
        """
        found = []
        for rank, who in self._of_this_host().items():
            state = who.state()
            silent = state != "running" if but is None else rank not in but
            memory = self._neighbours.get(rank)
            if silent and memory is not None:
                activity = read(memory)
                unasked = state == "running" and self._store is None
                if state != "gone" and not unasked:
                    _ask_for_stacks(who.number)
                    self._woken.add(rank)
                    activity = replace(activity, stack=read(memory).stack)
                found.append(
                    RankReport(
                        rank=rank,
                        host=who.host,
                        process=who.number,
                        activity=activity,
                        process_state=state,
                        answered=unasked,
                    )
                )
        return found

    def _end_neighbours(self) -> None:
        """End ranks of this host that are stopped or hang in native code: nobody else may come to do it.

        On a busy host a rank that was woken for its stacks may not have come to stop again yet.
        """
        for rank, who in self._of_this_host().items():
            state = who.state()
            if state == "stopped" or (state == "running" and rank in self._woken):
                with suppress(ProcessLookupError):
                    os.kill(who.number, signal.SIGKILL)

    def _ask(self, question: Callable[[Store], T]) -> T | None:
        """The store's answer; None when it has none in time. Then the store is lost, and is not asked again."""
        store = self._store
        if store is None:
            return None
        answers: list[T] = []
        asking = threading.Thread(target=_suppressed(lambda: answers.append(question(store))), daemon=True)
        asking.start()
        for _ in range(_ASK_TURNS):  # of a pause in which this process is suspended, only a turn counts
            asking.join(_ASK_SECONDS / _ASK_TURNS)
            if not asking.is_alive():
                break
        if not answers:
            self._store = None
            return None
        return answers[0]


def _nccl_flight() -> str:
    """The collectives that NCCL itself has under way, as torch's flight recorder has them; empty on other backends."""
    if not dist.is_initialized() or "nccl" not in str(dist.get_backend_config()):
        return ""
    # It is `_dump_nccl_trace_json` in torch 2.11 and `_dump_fr_trace_json` in 2.13.
    names = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    dump = next(filter(None, (getattr(torch._C._distributed_c10d, name, None) for name in names)), None)
    return dump(includeCollectives=True, onlyActive=True).decode()[:_MAX_FLIGHT] if dump else ""


def _own_connection(store: Store) -> Store:
    """A connection that no other thread can be waiting on."""
    own = store.clone() if hasattr(store, "clone") else store
    own.set_timeout(timedelta(seconds=_ASK_SECONDS))
    return PrefixStore("watchdog", own)


def _suppressed(act: Callable[[], object]) -> Callable[[], None]:
    def quietly() -> None:
        with suppress(Exception):
            act()

    return quietly


def _is_of_communication(error: Exception) -> bool:
    """Whether a collective failed because of the other side: gloo's errors are plain RuntimeErrors."""
    named = re.search("gloo|nccl|connection|socket", str(error), re.IGNORECASE)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and named is not None)


def _escaped(text: str) -> str:
    """Lines with escapes for what a terminal would not show as it is; a traceback may hold a name of a file."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _leave_after(seconds: float, code: int) -> None:
    time.sleep(seconds)
    os._exit(code)


def _ask_for_stacks(process: int) -> None:
    if STACK_SIGNAL is None:
        return
    with suppress(ProcessLookupError):
        os.kill(process, STACK_SIGNAL)
        os.kill(process, signal.SIGCONT)  # a stopped process takes its signals when it goes on
        time.sleep(0.2)
        os.kill(process, signal.SIGSTOP)  # it shall do no more; `_end_neighbours` ends what is stopped


def _packed(reports: list[RankReport]) -> str:
    return json.dumps([asdict(report) for report in reports])


def _unpacked(data: bytes) -> list[RankReport]:
    found = []
    for fields in json.loads(data):
        one = RankReport(**(fields | {"activity": None}))
        if fields["activity"]:
            activity = fields["activity"]
            one = replace(one, activity=RankState(**(activity | {"history": tuple(activity["history"])})))
        found.append(one)
    return found
