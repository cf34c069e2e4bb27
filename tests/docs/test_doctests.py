"""The examples in docstrings, and the Python blocks of the pages, are run."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

from tests.commands import REPOSITORY
from tests.programs import output_of

PACKAGE = REPOSITORY / "dist_train"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "docs" / "python.md"]


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def has_examples(file: Path) -> bool:
    tree = ast.parse(file.read_text())
    owners = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return any(">>> " in (ast.get_docstring(owner) or "") for owner in owners)


@pytest.mark.parametrize("module", [module_name(file) for file in sorted(PACKAGE.rglob("*.py")) if has_examples(file)])
def test_examples_in_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_a_page_run_in_the_printed_order(page: Path, tmp_path: Path) -> None:
    assert blocks(page)
    setup = "from dist_train.commands.sample import main\nmain('dist-train sample', ['demo'])\n"
    output_of(setup, tmp_path)
    output_of("\n".join(blocks(page)), tmp_path / "demo", WANDB_MODE="disabled")
