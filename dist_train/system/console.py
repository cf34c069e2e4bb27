"""Log lines on stderr, and the exit code of a command."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from rich.console import Console

from dist_train.errors import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_USER_ERROR, TrainingFault, UserError, printable
from dist_train.system.torchrun import has_peers, missing_from_torchrun, rank_for_messages, show_in_report

log = logging.getLogger("dist_train")

# Long enough for rank 0 to print its message before torchrun ends everybody because one rank has left.
QUIET_RANK_GRACE_SECONDS = 5.0


def set_up_logging(rank: int, *, has_peers: bool) -> None:
    """Log lines go to stderr with the time, and the rank where there are several; from WARNING up on all but rank 0."""
    handler = logging.StreamHandler(sys.stderr)
    who = f"[rank {rank}] " if has_peers else ""
    handler.setFormatter(_OneLine(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class _OneLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """A line with escapes for what a name in a file may hold."""
        return printable(super().formatMessage(record))


def terminal() -> Console:
    """A rich console on stderr; it shows nothing where log lines of INFO are not shown, as in a program of Python.

    Text is shown as it is: brackets in it are no markup.
    """
    quiet = not log.isEnabledFor(logging.INFO)
    return Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)


def print_json(value: Any) -> None:
    """Print a line of JSON on stdout, with JSON's own escapes for what a terminal does not show as it is."""
    text = json.dumps(value, ensure_ascii=False)
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text), flush=True)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command to its exit code: 0, 2 for the user's mistake, 1 for a fault. Does not return.

    A mistake is found by every rank; rank 0 prints it. The others give it the time to do so, and speak up when nobody
    has ended them by then: there may be no rank 0. In a half-set environment no rank is sure of its number: all speak.
    """
    rank = rank_for_messages(os.environ)
    set_up_logging(rank, has_peers=has_peers(os.environ))
    code = EXIT_FAULT
    try:
        main()
        code = 0
    except (UserError, TrainingFault) as error:
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAULT
        if rank != 0 and not missing_from_torchrun(os.environ):
            time.sleep(QUIET_RANK_GRACE_SECONDS)
        show_in_report(f"error: {error}", os.environ)
        _say(f"error: {error}")
    except BrokenPipeError:
        pass  # the program that read stdout has ended: nobody is left to tell
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else EXIT_FAULT if stop.code else 0
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BaseException:
        _say("\n".join(map(printable, traceback.format_exc().splitlines())))
    leave(code)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal was closed: the exit code still counts
        print(text, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process now. A normal interpreter exit after gloo has run aborts now and then, after all work is done."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or EXIT_FAULT  # the reader of our output has gone
    os._exit(code)
