"""What this rank is doing, in memory that outlives it: other ranks of the host can read it when it hangs or has died.

The main thread writes, without locks or system calls; the watchdog (`watchdog/watchdog.py`) reads. The stacks of all
threads go into the same memory: when asked by signal, without need of the interpreter, and when the process crashes.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, TracebackType

# Number of collectives so far, whether in one, since when (monotonic clock), optimizer step (-1: none), phase.
_STATE = struct.Struct("<q?dq48s")
_ENTRY_BYTES = 120
_ENTRIES = 48
_STACKS_AT = 8192
_MAX_STACK_BYTES = 1 << 18

# Python's own handlers cannot run in a process that hangs in native code; faulthandler's can.
STACK_SIGNAL = signal.SIGRTMIN + 7 if sys.platform == "linux" else None


@dataclass(frozen=True)
class RankState:
    """What a rank was doing when it was looked at.

    `step` None: not in an optimizer step; `collective`: the one that it waits in, None: in none; `seconds`: for how
    long; `count`: collectives begun so far; `history`: the last of them, oldest first; `stack`: all that was dumped.
    """

    phase: str
    step: int | None
    collective: str | None
    seconds: float
    count: int
    history: tuple[str, ...]
    stack: str


class Heartbeat:
    """The record of one rank."""

    def __init__(self, internal: tuple[str, ...] = ()) -> None:
        """`internal`: names of modules, without their packages, that a collective passes through on its way from the
        caller; the place of a collective is the nearest one outside of them."""
        self._internal = ("heartbeat", *internal)
        self._handle: int | None = None
        self._memory: bytearray | mmap.mmap = bytearray(_STACKS_AT)
        self._names: dict[tuple[str, CodeType, int], bytes] = {}
        self._count = 0
        self._phase = b"starting"
        self._step = -1
        self._depth = 0
        self._backward: str | None = None
        self._note()

    @property
    def handle(self) -> int:
        """File descriptor of the record, which another process of this host can open by way of /proc.

        Until it is first asked for, by the thread that writes, the record is in memory of this process alone.
        """
        if self._handle is None:
            self._handle = _memory()
            weakref.finalize(self, os.close, self._handle)
            os.ftruncate(self._handle, _STACKS_AT)
            memory = mmap.mmap(self._handle, _STACKS_AT)
            memory[:] = bytes(self._memory)
            self._memory = memory
        return self._handle

    def read(self) -> RankState:
        """This rank's own record, from any of its threads."""
        state = _state(bytes(self._memory)) if self._handle is None else read(self._handle)
        if state.collective is None and self._backward is not None and _main_thread_is_in_autograd():
            return replace(state, collective=self._backward)
        return state

    def keep_stacks(self) -> None:
        """From now on, crashes and STACK_SIGNAL leave the stacks of all threads in the memory."""
        os.lseek(self.handle, _STACKS_AT, os.SEEK_SET)
        faulthandler.enable(self.handle, all_threads=True)
        if STACK_SIGNAL is not None:
            faulthandler.register(STACK_SIGNAL, self.handle, all_threads=True)

    def dump_stacks(self) -> None:
        """Leave the stacks of all threads in the memory now."""
        faulthandler.dump_traceback(self.handle, all_threads=True)

    def keep(self, text: str) -> None:
        """Leave a text beside the stacks."""
        os.write(self.handle, text.encode())

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Inside the block this rank is busy with `name`; then with what it was busy with before.

        After a failure the record goes on saying where it was.
        """
        former = self._phase, self._step
        self._phase = name.encode()[:48]
        self._step = self._step if step is None else step
        self._note()
        yield
        self._phase, self._step = former
        self._note()

    def at_step(self, step: int) -> None:
        """An optimizer step begins, counted from 1."""
        self._step = step
        self._note()

    def waiting(self, what: str) -> _Waiting:
        """Inside the block this rank waits for the others, in the collective `what`."""
        return _Waiting(self, what)

    @contextmanager
    def backward(self, what: str) -> Iterator[None]:
        """Inside the block autograd computes, and waits for the others in `what` without telling when."""
        self._backward = what
        self._note()
        yield
        self._backward = None
        self._note()

    def enter(self, what: str) -> None:
        """A collective begins."""
        entry = _STATE.size + self._count % _ENTRIES * _ENTRY_BYTES
        self._memory[entry : entry + _ENTRY_BYTES] = self._name(what)
        self._count += 1
        self._depth += 1
        self._note()

    def leave(self) -> None:
        """It has ended."""
        self._depth -= 1
        self._note()

    def _note(self) -> None:
        _STATE.pack_into(self._memory, 0, self._count, self._depth > 0, time.monotonic(), self._step, self._phase)

    def _name(self, what: str) -> bytes:
        """The collective and the place in the code that called for it."""
        frame = sys._getframe(2)
        while frame.f_back and frame.f_globals["__name__"].rpartition(".")[2] in self._internal:
            frame = frame.f_back
        key = (what, frame.f_code, frame.f_lineno)
        name = self._names.get(key)
        if name is None:
            place = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}, line {frame.f_lineno}"
            name = self._names[key] = f"{what} in {place}".encode()[:_ENTRY_BYTES].ljust(_ENTRY_BYTES, b"\0")
        return name


class _Waiting:
    """A context manager without the cost of a generator: it surrounds every collective."""

    __slots__ = ("_heartbeat", "_what")

    def __init__(self, heartbeat: Heartbeat, what: str) -> None:
        self._heartbeat = heartbeat
        self._what = what

    def __enter__(self) -> None:
        self._heartbeat.enter(self._what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a failure the record goes on saying where it was.
        if kind is None:
            self._heartbeat.leave()


def read(handle: int) -> RankState:
    """The record behind a file descriptor of `Heartbeat.handle`, or of another process's."""
    return _state(os.pread(handle, _STACKS_AT + _MAX_STACK_BYTES, 0))


def _state(data: bytes) -> RankState:
    count, waits, since, step, phase = _STATE.unpack_from(data)
    entries = [_STATE.size + i % _ENTRIES * _ENTRY_BYTES for i in range(max(0, count - _ENTRIES), count)]
    history = tuple(_text(data[at : at + _ENTRY_BYTES]) for at in entries)
    return RankState(
        phase=_text(phase),
        step=None if step < 0 else step,
        collective=history[-1] if waits else None,
        seconds=time.monotonic() - since,
        count=count,
        history=history,
        stack=data[_STACKS_AT:].decode(errors="replace"),
    )


def _main_thread_is_in_autograd() -> bool:
    """Whether it is in autograd's engine itself, not in a Python function that the engine has called."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _memory() -> int:
    """A file in memory that goes away with the last process that has it open."""
    if sys.platform == "linux":
        return os.memfd_create("dist_train")
    handle, path = tempfile.mkstemp()
    Path(path).unlink()
    return handle
