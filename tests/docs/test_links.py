"""What the documentation names is there: linked pages, and files and folders of the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import REPOSITORY

PAGES = sorted(
    page
    for page in REPOSITORY.rglob("*.md")
    if not any(part.startswith(".") for part in page.relative_to(REPOSITORY).parts)
)
FOLDERS = ("tests", "docs", "dist_train", "launch", "slurm", "configs", "benchmarks", "tools", "examples")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/.-]+)`", text)
    assert [path for path in paths if not (REPOSITORY / path).exists() and "VERB" not in path] == []
