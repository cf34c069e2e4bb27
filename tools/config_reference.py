"""The table of every configuration key, made from the schema: default, type, meaning.

`make docs` runs it: `python -m tools.config_reference docs/configuration.md` rewrites the table between the markers.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_train.config.families import BUILT_IN, OF_TEXT
from dist_train.config.schema import JobConfig

BEGIN = "<!-- configuration keys: made by `make docs`, do not edit -->"
END = "<!-- end of configuration keys -->"


def markdown_table() -> str:
    """One row for each key, in the order of the schema."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for prefix, section in sections():
        texts = _texts_under_fields(type(section))
        for name, annotation, default in _keys(section):
            choices = ", ".join(f"`{choice}`" for choice in re.findall(r"['\"](\w+)['\"]", annotation))
            kind = f" One of {choices}." if choices else ""
            rows.append(f"| `{prefix}.{name}` | `{default}` | {(texts[name] + kind).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def sections() -> Iterator[tuple[str, Any]]:
    """What stands before the names of its keys, and the section with its defaults; a family's block after `model`."""
    config = JobConfig()
    for section in fields(config):
        yield section.name, getattr(config, section.name)
        if section.name == "model":
            yield from ((f"model.{name}", block()) for name, block in (BUILT_IN | OF_TEXT).items() if block)


def with_table(page: str) -> str:
    """The page with the text between its markers replaced by the table; ValueError when a marker is missing."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}"


def _keys(section: Any) -> Iterator[tuple[str, str, str]]:
    for field in fields(section):
        value = getattr(section, field.name)
        default = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
        # A row of the table is one line.
        yield field.name, str(field.type), json.dumps(value) if "\n" in default else default


def _texts_under_fields(section: type[Any]) -> dict[str, str]:
    """Field name -> the string literal that stands under the field in the source, there or in a base class."""
    (node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(node, ast.ClassDef)
    inherited = [_texts_under_fields(base) for base in section.__bases__ if is_dataclass(base)]
    return {name: text for texts in inherited for name, text in texts.items()} | {
        field.target.id: str(text.value.value)
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text()))
