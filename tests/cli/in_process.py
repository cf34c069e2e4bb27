"""Run a command inside the test's own process: as a user types it, without two seconds for another import of torch."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from dist_train.system import console
from tests.commands import environment
from tests.ranks import free_port, in_processes


@dataclass(frozen=True)
class CommandResult:
    """What a shell would see of a command."""

    code: int
    out: str
    err: str


class Left(BaseException):
    """In place of the process's end."""

    def __init__(self, code: int) -> None:
        self.code = code


def command(script: str, *arguments: object, **environ: str) -> CommandResult:
    """Exit code and output of `python launch/<script>.py ...`, by way of the same `run_command`."""
    main = importlib.import_module(f"dist_train.commands.{script}").main
    program = f"launch/{script}.py"
    out, err = StringIO(), StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(console, "leave", _leave),
        _environment(environment(**environ)),
        _logging_untouched(),
    ):
        try:
            console.run_command(lambda: main(program, [*map(str, arguments)]))
        except Left as left:
            return CommandResult(left.code, out.getvalue(), err.getvalue())


def command_on_ranks(ranks: int, script: str, *arguments: object) -> list[CommandResult]:
    """The same on several ranks, in rank order: processes with the environment that torchrun gives, but forked."""
    return in_processes(ranks, _rank, ranks, free_port(), script, arguments)


def _rank(rank: int, ranks: int, port: int, script: str, arguments: tuple[object, ...]) -> CommandResult:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return command(script, *arguments, MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in place.items()})


def _leave(code: int) -> NoReturn:
    raise Left(code)


@contextmanager
def _environment(environ: Mapping[str, str]) -> Iterator[None]:
    former = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)


@contextmanager
def _logging_untouched() -> Iterator[None]:
    log = logging.getLogger("dist_train")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    try:
        yield
    finally:
        log.handlers[:], log.level, log.propagate = handlers, level, propagate


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file of a tree with its bytes, every folder with None: equal before and after means nothing was written."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
