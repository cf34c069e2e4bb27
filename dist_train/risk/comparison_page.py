"""A comparison of runs as text for a terminal, and as a page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dist_train.risk.figures import Figures, drawn
from dist_train.risk.page import document, figures_in, number_of, table_of

_COLOURS = ("#0f7ac0", "#d1660f", "#2f8f4e", "#a03fb0", "#7a7a7a", "#b58900", "#c2343f", "#3aa6a6")


def text_of(content: Mapping[str, Any]) -> str:
    """The comparison in lines; differences of configuration first."""
    parts = []
    for title, head, rows in _tables(content):
        if rows:
            parts.append("\n".join([title, *_aligned([head, *[tuple(map(_cell, row)) for row in rows]])]))
    return "\n\n".join(parts) + "\n"


def comparison_page(content: Mapping[str, Any]) -> str:
    """The page: the same tables, the curves over each other, and the keys that are the same."""
    body = "".join(
        f"<section><h2>{escape(title)}</h2>{table_of(head, rows)}</section>"
        for title, head, rows in _tables(content)
        if rows
    )
    body += f"<section><h2>Curves</h2>{figures_in(_figures(content), 'train', 'valid')}</section>"
    same = [(key, _cell(value)) for key, value in content["configuration"]["same"].items()]
    body += f"<section><h2>Keys that are the same</h2>{table_of(('key', 'value'), same)}</section>"
    names = ", ".join(content["runs"])
    return document(f"Comparison of {len(content['runs'])} runs", names, "", body)


def _tables(content: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    runs = tuple(content["runs"])
    different = [(key, *map(_cell, values)) for key, values in content["configuration"]["different"].items()]
    tables = [("Keys that differ", ("key", *runs), different)]
    for split, metrics in content["metrics"].items():
        rows = [(name, *values) for name, values in metrics.items()]
        tables.append((f"Metrics of the {split} rows", ("metric", *runs), rows))
    tables.append(("Training", ("", *runs), [(name, *of) for name, of in content["of_the_run"].items()]))
    rows = [_difference(line) for line in content["differences"]]
    head = ("run", "log loss", "from", "to", "accuracy", "from", "to")
    tables.append((f"Test rows: run less {runs[0]}, with 95 % intervals of paired differences", head, rows))
    return tables


def _difference(line: Mapping[str, Any]) -> tuple[Any, ...]:
    if "reason" in line:
        return (f"{line['run']}: {line['reason']}", *[None] * 6)
    parts = [line[name] for name in ("loss", "accuracy")]
    return (line["run"], *(x for part in parts for x in (part["difference"], *(part["interval"] or (None, None)))))


def _cell(value: Any) -> str:
    return number_of(value, markup=False)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.rjust(w) if place else cell.ljust(w) for place, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
        for row in rows
    ]


def _figures(content: Mapping[str, Any]) -> Figures:
    figures: Figures = {}
    for split, words in (
        ("train", "Training loss by optimizer step."),
        ("valid", "Validation loss by optimizer step."),
    ):

        def draw(axes: Any, split: str = split) -> bool:
            lines = {name: curves[split] for name, curves in content["curves"].items() if curves.get(split)}
            for place, (name, points) in enumerate(lines.items()):
                steps, losses = zip(*points, strict=True)
                axes.plot(steps, losses, color=_COLOURS[place % len(_COLOURS)], label=name)
            axes.set(xlabel="optimizer step", ylabel=f"{split} loss")
            if lines:
                axes.legend(fontsize=7)
            return bool(lines)

        picture = drawn(split, draw)
        if picture is not None:
            figures[split] = (words, *picture)
    return figures
