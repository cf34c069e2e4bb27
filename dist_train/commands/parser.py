"""The argument parser of a command. Its help shows the command as the user has called it."""

from __future__ import annotations

import argparse
import re

INSTALLED = "dist-train"


def command_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `program`: `dist-train VERB`, `python -m dist_train VERB` or `launch/VERB.py`.

    `description` is the docstring of the command's module. Its examples are written for the installed program.
    """
    return argparse.ArgumentParser(
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
