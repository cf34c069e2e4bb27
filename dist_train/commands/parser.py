"""The argument parser of a command. Its help shows the command as the user has called it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from dist_train.config.load import is_too_long
from dist_train.errors import printable

INSTALLED = "dist-train"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def path(text: str) -> Path:
    """A path in an argument; a shell leaves the `~` in --data=~/clients.csv alone."""
    if is_too_long(text):
        raise argparse.ArgumentTypeError(f"a name of {len(text)} characters is too long")
    return Path(text).expanduser() if text.startswith("~/") else Path(text)


def command_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `program`: `dist-train VERB`, `python -m dist_train VERB` or `launch/VERB.py`.

    `description` is the docstring of the command's module. Its examples are written for the installed program.
    """
    return _Parser(
        prog=program,
        description=as_called(program, description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def as_called(program: str, text: str) -> str:
    """`text` with its examples written for the way in which `program` was called."""
    if program.startswith("launch/"):
        text = re.sub(r"-m dist_train (\w+)", r"launch/\1.py", text)
        return re.sub(rf"\b{INSTALLED} (\w+)", r"python launch/\1.py", text)
    return re.sub(rf"\b{INSTALLED} (?=\w)", f"{program.rpartition(' ')[0]} ", text)
