"""The table of every configuration key, made from the schema: default, type, meaning.

`make docs` runs it: `python -m tools.config_reference docs/configuration.md` rewrites the table between the markers.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import yaml

from dist_train.config import schema
from dist_train.config.schema import JobConfig

BEGIN = "<!-- configuration keys: made by `make docs`, do not edit -->"
END = "<!-- end of configuration keys -->"


def markdown_table() -> str:
    """One row for each key, in the order of the schema."""
    texts = _texts_under_fields()
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for section in fields(JobConfig):
        for name, annotation, default in _keys(section.name):
            text = texts[type(getattr(JobConfig(), section.name)).__name__][name]
            choices = ", ".join(f"`{choice}`" for choice in re.findall(r"['\"](\w+)['\"]", annotation))
            kind = f" One of {choices}." if choices else ""
            rows.append(f"| `{section.name}.{name}` | `{default}` | {(text + kind).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """The page with the text between its markers replaced by the table; ValueError when a marker is missing."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}"


def _keys(section: str) -> Iterator[tuple[str, str, str]]:
    values = getattr(JobConfig(), section)
    for field in fields(values):
        default = yaml.safe_dump(getattr(values, field.name), default_flow_style=True, width=1000)
        yield field.name, str(field.type), default.strip().removesuffix("...").strip()


def _texts_under_fields() -> dict[str, dict[str, str]]:
    """Class name -> field name -> the string literal that stands under the field in the source."""
    texts: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            texts[node.name] = {
                field.target.id: str(text.value.value)
                for field, text in pairs
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            }
    return texts


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text()))
