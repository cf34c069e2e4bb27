"""The tables of the leaderboard, what its peers get of them, and the page that is made of the results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss as expected_log_loss

pytest.importorskip("pandas")

from benchmarks.quality import page, peers, tables
from benchmarks.quality.__main__ import CONTESTANTS, OWN
from tests.commands import REPOSITORY

SMALL = ("breast_cancer", "diabetes", "small", "wine")


@pytest.mark.parametrize("name", SMALL)
def test_a_table_is_a_function_of_its_name(name: str, tmp_path: Path) -> None:
    first, second = (pl.read_parquet(tables.write(name, tmp_path / folder)) for folder in ("a", "b"))
    assert first.equals(second)
    shares = first["split"].value_counts(normalize=True)
    assert dict(shares.iter_rows()) == pytest.approx({"train": 0.6, "valid": 0.2, "test": 0.2}, abs=0.02)
    classes = set(first["target"])
    assert all(set(rows["target"]) == classes for _, rows in first.group_by("split"))


def test_a_peer_gets_codes_of_the_training_rows_and_no_target(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    pl.DataFrame(
        {
            "x": [1.0, None, 3.0, 4.0, 5.0, 6.0],
            "k": ["a", "b", "new", "a", None, "b"],
            "target": ["yes", "no", "no", "yes", "yes", "no"],
            "split": ["train", "train", "valid", "valid", "test", "test"],
        }
    ).write_parquet(file)
    problem = peers.read(file, seed=0)
    assert list(problem.train.x) == ["x", "k"]
    assert problem.categorical == ["k"]
    assert list(problem.valid.x["k"].cat.categories) == ["a", "b"]
    assert problem.valid.x["k"].isna().tolist() == [True, False]
    assert problem.train.y.tolist() == [1, 0]


def test_the_log_loss_is_that_of_scikit_learn() -> None:
    targets = np.array([0, 2, 1])
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.4, 0.5, 0.1]])
    assert peers.log_loss(probabilities, targets) == pytest.approx(expected_log_loss(targets, probabilities))


def test_the_page_has_means_spreads_and_what_was_not_measured(tmp_path: Path) -> None:
    def runs(*losses: float) -> dict[str, object]:
        return {str(i): {"valid": x, "test": x, "cpu_seconds": 10.0} for i, x in enumerate(losses)}

    built_in = {"any_table": runs(0.58, 0.60), "lightgbm_tuned": runs(0.595), "lightgbm": runs(0.60)}
    other = {"any_table": runs(0.4), "lightgbm": runs(0.5), "realmlp": {"0": {"skipped": "pytabkit is not installed"}}}
    file = tmp_path / "quality.md"
    page.write_page({"results": {"credit_card_risk": built_in, "small": other}}, file)
    text = file.read_text()
    assert "| any_table.yaml | 0.5900 ± 0.0141 | 2 | 10 | yes |" in text
    assert "| LightGBM, default | 0.6000 | 1 | 10 | no |" in text
    assert "| small | 0.4000 | 0.5000 |  | -20.0 % |" in text
    assert "- RealMLP (pytabkit): pytabkit is not installed (small)" in text


def test_the_leaderboard_stands_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page._MARKS[0]}old\n{page._MARKS[1]}after\n")
    known = {"results": {"credit_card_risk": {"any_table": {"0": {"valid": 0.5, "test": 0.5, "cpu_seconds": 9.0}}}}}
    for _ in range(2):
        page.write_leaderboard(known, readme)
    assert readme.read_text().splitlines()[0] == "before"
    assert readme.read_text().splitlines()[-1] == "after"
    assert "old" not in readme.read_text()
    assert readme.read_text().count("| any_table.yaml | 0.5000 | 1 | 9 |") == 1


def test_every_contestant_has_a_title_and_a_configuration() -> None:
    assert list(page._TITLES) == CONTESTANTS
    assert all((REPOSITORY / file).is_file() for files in OWN.values() for file in files)
