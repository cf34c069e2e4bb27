"""Run a Python program in a process of its own, forked with torch loaded, that knows nothing of the tests beside it."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

from tests.commands import environment
from tests.ranks import in_processes


def output_of(program: str, folder: Path, **more: str) -> str:
    """What `python -W error -c program` prints in `folder`. A failure fails the test with its traceback."""
    (printed,) = in_processes(1, _run, program, folder, environment(**more))
    assert isinstance(printed, str)
    return printed


def _run(_: int, program: str, folder: Path, environ: dict[str, str]) -> str:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.path.insert(0, str(folder))
    main = sys.modules["__main__"] = ModuleType("__main__")
    warnings.simplefilter("error")
    with redirect_stdout(StringIO()) as printed:
        exec(compile(program, "program", "exec"), main.__dict__)
    return printed.getvalue()
