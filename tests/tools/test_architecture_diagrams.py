"""The diagrams of the architecture page are those of the code."""

from __future__ import annotations

import pytest

from tests.commands import REPOSITORY
from tools import architecture_diagrams
from tools.architecture_diagrams import imports, layers, objects, packages, problems_of_objects, with_diagrams

PAGE = REPOSITORY / "docs" / "architecture.md"


def test_the_page_has_the_diagrams_of_this_code() -> None:
    page = PAGE.read_text()
    assert page == with_diagrams(page), "run `make docs`"


def test_every_object_is_held_as_declared() -> None:
    assert problems_of_objects() == []
    assert len(objects().splitlines()) > 20


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (("run.job", "Job", "folder", "Folder", "run.job"), "not where HOLDS says"),
        (("run.job", "Job", "run()", "RunLock", "run.checkpoint.lock"), "nothing in the class makes one"),
        (("run.job", "Job", "attic", "RunFolder", "run.checkpoint.run_folder"), "no such attribute"),
    ],
)
def test_a_wrong_declaration_is_found(
    entry: tuple[str, str, str, str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture_diagrams, "HOLDS", (entry,))
    assert [text.partition(": ")[2] for text in problems_of_objects()] != []
    assert problem in problems_of_objects()[0]


def test_every_package_has_a_layer_and_a_description() -> None:
    named = {name for row in layers() for name in row}
    assert set(imports()) <= named
    table = PAGE.read_text().partition("| package |")[2].partition("## ")[0]
    assert [name for name in imports() if f"`{name}`" not in table] == []
    assert "commands --> serving" in packages()
    assert "serving --> run" in packages()


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        with_diagrams("")
