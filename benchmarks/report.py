"""Medians with their spread, tables for a person, one JSON file for everybody else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dist_train.system.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "bench.json"
_WIDTH = 170  # of a log, which has no width of its own
_VERSIONS = (
    "torch",
    "lightning",
    "accelerate",
    "transformers",
    "peft",
    "jax",
    "optax",
    "scikit-learn",
    "numpy",
    "polars",
)


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contestant reaches in each round. They take turns, and another one begins each round."""
    names = list(contestants)
    reached: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            reached[name].append(contestants[name]())
    return reached


def measured(values: Sequence[float]) -> dict[str, Any]:
    """Median, spread (highest over lowest) and the values themselves."""
    return {"median": statistics.median(values), "spread": max(values) / min(values), "values": list(values)}


class Report:
    """Sections of results, each of them JSON types and a table; shown as they come, and once more at the end."""

    def __init__(self) -> None:
        self.sections: dict[str, Any] = {}
        self._tables: list[Table] = []
        terminal = Console()
        self._console = terminal if terminal.is_terminal else Console(width=_WIDTH)

    def say(self, text: str) -> None:
        """A line about what is going on."""
        self._console.print(text)

    def add(self, name: str, results: Any, table: Table) -> None:
        """A section that has been measured."""
        self.sections[name] = results
        self._tables.append(table)
        self._console.print(table)

    def skip(self, name: str, reason: str) -> None:
        """A section that cannot be measured here."""
        self.sections[name] = {"skipped": reason}
        self.say(f"{name}: skipped: {reason}")

    def close(self, file: Path | None) -> None:
        """Show all tables together and write the file, if one is wanted."""
        if len(self._tables) > 1:
            self._console.rule("all results")
            for shown in self._tables:
                self._console.print(shown)
        if file:
            file.parent.mkdir(exist_ok=True)
            head = {"machine": describe_machine(torch.device("cpu")), "versions": _versions()}
            if torch.cuda.is_available():  # on which the sections were measured whose names end in cuda
                head["gpu_machine"] = describe_machine(torch.device("cuda", 0))
            file.write_text(json.dumps(head | self.sections, indent=1) + "\n")
            self.say(f"written to {file}")


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(title: str, *columns: str) -> Table:
    """An empty table whose numbers are on the right."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def cell(result: Mapping[str, Any], number: str) -> str:
    """A median with its spread."""
    return f"{number.format(result['median'])} ±{result['spread']:.2f}"
