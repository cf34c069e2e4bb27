"""When one rank fails, hangs or vanishes: every rank ends soon, and one report says which rank, where and why.

A thread on each rank looks twice a second whether this rank has waited in a collective for longer than the timeout, and
whether another rank has raised the alarm. The first to raise it gathers what every rank was doing
(`watchdog/heartbeat.py`), finds out which is to blame (`watchdog/diagnosis.py`), writes the report and prints the
verdict; the others are silent.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.stopping import Launcher
from dist_train.errors import EXIT_FAULT, PeerFailed, Stopped, TrainingFault, UserError
from dist_train.watchdog.diagnosis import RankReport, Verdict, diagnose, headline, report
from dist_train.watchdog.heartbeat import STACK_SIGNAL, RankState, read
from dist_train.watchdog.processes import Process

T = TypeVar("T")

_LOOK_SECONDS = 0.5
# To publish what one was doing; to hear from all others; to close books and connections once the report is written.
_ASK_SECONDS = 2.0
_COLLECT_SECONDS = 3.0
_LEAVE_SECONDS = 2.0
_MAX_FLIGHT = 20_000


class LauncherDied(TrainingFault):
    """The run was saved and ended because torchrun is gone."""


@contextmanager
def watched(
    collectives: Collectives,
    store: Store,
    *,
    timeout_seconds: float,
    report_file: Path | None,
    launcher: Launcher | None = None,
    title: str = "",
) -> Iterator[None]:
    """Watch over the ranks inside the block. Called by all of them.

    What a user can mend, an agreed fault and an agreed stop pass through. Any other failure, on any rank, ends every
    rank with EXIT_FAULT; the report is appended to `report_file`, None: it goes to stderr.
    """
    watch = Watchdog(collectives, store, timeout_seconds, report_file, launcher, title)
    watch.start()
    try:
        yield
    except (PeerFailed, LauncherDied) as error:
        watch.fail(error)
    except (UserError, TrainingFault, Stopped):
        raise
    except Exception as error:
        if collectives.size == 1:  # nobody waits: the traceback says it all
            raise
        watch.fail(error)
    finally:
        watch.end()


class Watchdog:
    """The watch of one rank."""

    def __init__(
        self,
        collectives: Collectives,
        store: Store,
        timeout_seconds: float,
        report_file: Path | None,
        launcher: Launcher | None,
        title: str,
    ) -> None:
        self._rank = collectives.rank
        self._pulse = collectives.heartbeat
        self._store: Store | None = _own_connection(store)
        self._timeout_seconds = timeout_seconds
        self._report_file = report_file
        self._launcher = launcher
        self._title = title
        self._ended = threading.Event()
        self._alarmed = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        handles, self._ranks = zip(
            *collectives.all_gather_object(lambda: (self._pulse.handle, Process.of(os.getpid()))), strict=True
        )
        self._neighbours = {
            rank: who.open_file(handles[rank], os.O_RDONLY) for rank, who in self._of_this_host().items()
        }
        self._woken: set[int] = set()
        self._alone = len(self._ranks) == 1
        collectives.all_gather_object(lambda: None)  # nobody leaves before its memory has been opened

    def _of_this_host(self) -> dict[int, Process]:
        host = self._ranks[self._rank].host
        return {rank: who for rank, who in enumerate(self._ranks) if rank != self._rank and who.host == host}

    def start(self) -> None:
        """Begin to look."""
        if not self._alone:
            self._pulse.keep_stacks()
            self._thread.start()

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        for handle in self._neighbours.values():
            if handle is not None:
                with suppress(OSError):
                    os.close(handle)
        self._neighbours = {}

    def fail(self, error: Exception) -> None:
        """This rank cannot go on. Raises SystemExit once the report has been written."""
        if not self._alarmed.acquire(blocking=False):
            self._thread.join()  # it has heard the alarm, and ends this process
        self._alarm(timed_out=False, error=None if isinstance(error, (PeerFailed, LauncherDied)) else error)
        threading.Thread(target=_leave_after, args=(_LEAVE_SECONDS,), daemon=True).start()
        raise SystemExit(EXIT_FAULT)

    def _watch(self) -> None:
        """The thread."""
        orphaned_at = None
        while not self._ended.wait(_LOOK_SECONDS):
            reading = self._pulse.read()
            waited = reading.collective is not None and reading.seconds > self._timeout_seconds
            if orphaned_at is None and self._launcher and self._launcher.died:
                orphaned_at = time.monotonic()
            # An orphan ends by itself at the next step; unless it hangs.
            orphaned = orphaned_at is not None and time.monotonic() - orphaned_at > self._timeout_seconds
            if (waited or orphaned or self._heard()) and self._alarmed.acquire(blocking=False):
                self._alarm(timed_out=waited, error=None)
                os._exit(EXIT_FAULT)

    def _heard(self) -> bool:
        return bool(self._ask(lambda store: store.check(["alarm"])))

    def _alarm(self, *, timed_out: bool, error: Exception | None) -> None:
        """Say what this rank was doing; the first to get here hears the others and reports."""
        self._pulse.dump_stacks()
        self._pulse.keep(_nccl_flight())
        mine, unresponsive = self._own_statement(error), self._unresponsive() if self._speaks_for_its_host() else []
        first = self._ask(lambda store: store.add("alarm", 1)) == 1
        self._ask(lambda store: store.set(f"rank{self._rank}", _packed([mine, *unresponsive])))
        if first or (self._store is None and self._speaks_for_its_host()):
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
        found = {rank: other for rank, other in found.items() if rank not in heard or other.state == "stopped"}
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
        # Who tells: where a cable is cut, each side blames the other.
        teller = f"told by rank {self._rank} (host {self._ranks[self._rank].host})"
        title = f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {self._title}".rstrip()
        whole = report(ranks, verdict, f"{title}, {teller}")
        said = headline(ranks, verdict)
        where = ""
        if self._report_file is not None:
            try:
                self._report_file.parent.mkdir(parents=True, exist_ok=True)
                with self._report_file.open("a") as stream:
                    stream.write(whole)
                where = f"every rank's stack: {self._report_file}"
            except OSError as error:
                where = f"{self._report_file} cannot be written ({error.strerror}):\n{whole}"
        errors = [r.error for r in ranks if r.rank in verdict.blamed and r.error and not r.launcher_died]
        print("\n".join([f"error: {said}", *errors[:1], where or whole]), file=sys.stderr, flush=True)

    def _own_statement(self, error: Exception | None) -> RankReport:
        who = self._ranks[self._rank]
        died = self._launcher is not None and self._launcher.died
        return RankReport(
            rank=self._rank, host=who.host, process=who.number, reading=self._pulse.read(), state="running",
            answered=True, error="".join(traceback.format_exception(error)) if error else None,
            lost_connection=error is not None and _is_of_communication(error), launcher_died=died,
        )  # fmt: skip

    def _speaks_for_its_host(self) -> bool:
        """Whether this is the one rank of the host that looks after the fallen: to look may wake them for a moment."""
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
                reading = read(memory)
                unasked = state == "running" and self._store is None
                if state != "gone" and not unasked:
                    _ask_for_stacks(who.number)
                    self._woken.add(rank)
                    reading = replace(reading, stack=read(memory).stack)
                found.append(
                    RankReport(
                        rank=rank, host=who.host, process=who.number, reading=reading, state=state, answered=unasked
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
        asking.join(_ASK_SECONDS)
        if not answers:
            self._store = None
            return None
        return answers[0]


def _nccl_flight() -> str:
    """The collectives that NCCL itself has under way, as torch's flight recorder has them; empty on other backends."""
    if not dist.is_initialized() or "nccl" not in str(dist.get_backend_config()):
        return ""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    return dump(includeCollectives=True, onlyActive=True).decode()[:_MAX_FLIGHT] if dump else ""


def _own_connection(store: Store) -> Store:
    """A connection that no other thread can be waiting on."""
    own = store.clone() if hasattr(store, "clone") else store
    own.set_timeout(timedelta(seconds=_ASK_SECONDS))
    return PrefixStore("watch", own)


def _suppressed(act: Callable[[], object]) -> Callable[[], None]:
    def quietly() -> None:
        with suppress(Exception):
            act()

    return quietly


def _is_of_communication(error: Exception) -> bool:
    """Whether a collective failed because of the other side: gloo's errors are plain RuntimeErrors."""
    named = re.search("gloo|nccl|connection|socket", str(error), re.IGNORECASE)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and named is not None)


def _leave_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(EXIT_FAULT)


def _ask_for_stacks(process: int) -> None:
    if STACK_SIGNAL is None:
        return
    with suppress(ProcessLookupError):
        os.kill(process, STACK_SIGNAL)
        os.kill(process, signal.SIGCONT)  # a stopped process takes its signals when it goes on
        time.sleep(0.2)
        os.kill(process, signal.SIGSTOP)  # it shall do no more; `_end_neighbours` ends what is stopped


def _packed(statements: list[RankReport]) -> str:
    return json.dumps([asdict(t) for t in statements])


def _unpacked(data: bytes) -> list[RankReport]:
    found = []
    for fields in json.loads(data):
        statement = RankReport(**(fields | {"reading": None}))
        if fields["reading"]:
            reading = RankState(**(fields["reading"] | {"history": tuple(fields["reading"]["history"])}))
            statement = replace(statement, reading=reading)
        found.append(statement)
    return found
