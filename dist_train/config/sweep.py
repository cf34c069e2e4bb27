"""A sweep file: each line holds the key=value of one run. `slurm/array.sbatch` reads the same file."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dist_train.config.load import load_config
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError

_MOST_LETTERS = 100


def sweep_lines(file: Path, config: Sequence[str]) -> list[list[str]]:
    """The key=value of each line, as words; `config` are the configuration files and key=value that come before.

    Raises:
        UserError: the file cannot be read, or one of its lines is no configuration.
    """
    if file.suffix != ".txt":
        raise UserError(f"{file}: the name of a sweep file ends in .txt")
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if not lines:
        raise UserError(f"{file}: is empty; each line holds the key=value of one run")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line)
            load_config([*config, *words])
        except (UserError, ValueError) as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        if not words:
            raise UserError(f"{file}, line {number}: is empty; it holds the key=value of one run")
        found.append(words)
    return found


def runs_of_sweep(file: Path, config: Sequence[str]) -> list[tuple[JobConfig, list[str]]]:
    """The configuration of each line, and the arguments that give it.

    A run is named by the line's values, as `credit_risk-lr=0.01-dropout=0.2`.

    A line that names its run keeps the name.

    Raises:
        UserError: as `sweep_lines`, or two lines have the same name.
    """
    base = load_config(config).run.name
    runs = []
    for words in sweep_lines(file, config):
        named = any(word.partition("=")[0] == "run.name" for word in words)
        given = [*config, *words, *([] if named else [f"run.name='{_named(base, words)}'"])]
        runs.append((load_config(given), given))
    counts = Counter(run.run.name for run, _ in runs)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{file}: two lines are the run {twice!r}: they have the same values, or name it so")
    return runs


def _named(base: str, words: Sequence[str]) -> str:
    parts = [f"{key.rpartition('.')[2]}={value}" for key, _, value in (word.partition("=") for word in words)]
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts))
    if len(name) > _MOST_LETTERS:
        name = f"{name[:_MOST_LETTERS]}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"
    return f"{base.replace(chr(39), chr(39) * 2)}-{name}"
