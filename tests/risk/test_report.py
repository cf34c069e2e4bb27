"""The report on a run: its page, its numbers, and what recomputes them."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dist_train.config.schema import ReportConfig
from dist_train.errors import UserError
from dist_train.risk.analysis import ScoredRows, analysis_of, positive_class
from dist_train.risk.beside import predictions_beside
from dist_train.risk.columns import typed
from dist_train.run.reporting import differences
from tests.cli.in_process import command, command_on_ranks
from tests.resume.jobs import run_job, tiny_job

QUICK = ("train.max_steps=30", "train.early_stopping_patience=null", "report.bootstrap_repeats=10")


def write_loans(folder: Path) -> Path:
    """Loans with a branch that is no feature, and a name that would break a page."""
    rng = np.random.default_rng(5)
    income, debt = rng.normal(50, 20, 800), rng.normal(10, 5, 800)
    debt[::9] = np.nan
    grade = np.where(income / 20 - np.nan_to_num(debt) / 5 + rng.normal(size=800) > -0.3, "good", "<b>bad")
    columns = {"income": income, "debt": debt, "region": rng.choice(["north", "south"], 800), "grade": grade}
    branch = rng.choice(["city & sea", "farm"], 800)
    pl.DataFrame(columns | {"branch": branch}).fill_nan(None).write_csv(folder / "table.csv")
    return folder / "table.csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose report is made at its end."""
    folder = tmp_path_factory.mktemp("report")
    arguments = tiny_job(write_loans(folder), folder / "run", *QUICK, "data.drop=[branch]")
    ended = run_job([*arguments, "report.enabled=true", "report.segments=[branch]"])
    assert ended.codes == [0], ended.errors
    return folder / "run"


def content_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "report.json").read_text())
    return content


class Page(HTMLParser):
    """What a browser would load, and what a reader of a screen needs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.unnamed: list[str] = []
        self.headings: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        links = [given.get(name) or "" for name in ("src", "href", "xlink:href")]
        self.loads += [link for link in links if link and not link.startswith("#")]
        if tag == "svg" and not given.get("aria-label"):
            self.unnamed.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()


def test_the_page_is_one_file_that_needs_no_network(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert "url(http" not in text
    assert "<script" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.unnamed == []
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert '<html lang="en">' in text
    assert "prefers-color-scheme:dark" in text
    assert "<b>bad" not in text
    assert "city &amp; sea" in text
    names = {file.stem for file in (run / "figures").glob("*.png")}
    assert {"reliability", "roc", "scores", "bands", "capture", "stability", "training"} <= names


def test_the_numbers_are_those_of_the_run(run: Path) -> None:
    content, summary = content_of(run), json.loads((run / "summary.json").read_text())
    assert content["positive_class"] == "<b>bad"
    for split in ("valid", "test"):
        assert content["probabilities"][split]["own"]["log_loss"] == pytest.approx(summary[split]["loss"], abs=1e-12)
        assert content["positive"][split]["auroc"] == pytest.approx(summary[split]["auroc"])
        shipped = content["probabilities"][split]["shipped"]["log_loss"]
        assert shipped == pytest.approx(summary[split]["calibrated"]["loss"], abs=1e-12)
    assert sum(content["rows"][split]["rows"] for split in content["rows"]) == 800
    low, high = content["intervals"]["auroc"]
    assert low < content["positive"]["test"]["auroc"] < high
    assert {line["segment"] for line in content["segments"]["branch"]["segments"]} <= {
        "city & sea",
        "farm",
        "hill",
        "(others)",
    }
    assert {line["feature"] for line in content["features"]} == {"income", "debt", "region"}
    assert {"this model", "class frequencies", "logistic regression"} <= set(content["beside"]["models"])
    assert content["card"]["run"] == "run"
    assert content["card"]["weights_sha256"] == summary["weights_sha256"]


def test_every_number_is_recomputed_on_one_rank_and_on_two(run: Path) -> None:
    one = command("report", run, "--verify")
    assert one.code == 0, one.err
    assert json.loads(one.out) == {"differences": 0}
    two = command_on_ranks(2, "report", run, "--verify")
    assert [rank.code for rank in two] == [0, 0], two[0].err


def test_a_number_that_was_changed_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    content = content_of(run)
    content["lift"][2]["capture"] += 1e-15
    content["card"]["steps"] = 7
    (tmp_path / "run" / "report.json").write_text(json.dumps(content))
    found = command("report", tmp_path / "run", "--verify")
    assert found.code == 1
    assert "lift.2.capture: recorded" in found.err
    assert "card.steps: recorded 7, recomputed 30" in found.err
    assert json.loads(found.out) == {"differences": 2}


def test_made_again_it_is_the_same_file_and_keys_change_it(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert command("report", tmp_path / "run").code == 0
    assert (tmp_path / "run" / "report.html").read_bytes() == (run / "report.html").read_bytes()
    keys = ("report.positive_class=good", "report.segments=[]", "report.false_negative_cost=9")
    assert command("report", tmp_path / "run", *keys).code == 0
    content = content_of(tmp_path / "run")
    assert content["positive_class"] == "good"
    assert content["segments"] == {}
    assert content["threshold"]["costs"] == {"false_positive": 1.0, "false_negative": 9.0}


MISTAKES = {
    "report.positive_class=ugly": "report.positive_class: there is no class 'ugly'; there is <b>bad, good",
    "report.segments=[planet]": "no column 'planet' (report.segments)",
    "report.dependence=[branch]": "report.dependence: 'branch' is no column of the model",
    "train.epochs=3": "only keys of the section report can be given here",
    "report.bootstrap_repeats=1": "report.bootstrap_repeats: must be at least 10",
    "report.false_positive_cost=0": "report.false_positive_cost: must be finite and above 0",
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_costs_one_line(run: Path, key: str) -> None:
    found = command("report", run, key)
    assert found.code == 2
    assert MISTAKES[key] in found.err
    assert len(found.err.strip().splitlines()) == 1


def test_a_folder_that_is_no_finished_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    assert "dist-train report" in command("report", tmp_path / "run", "--verify").err
    (tmp_path / "run" / "summary.json").unlink()
    assert "the run is not finished" in command("report", tmp_path / "run").err


def test_splits_without_rows_classes_without_rows_and_no_table() -> None:
    rng = np.random.default_rng(0)

    def rows(number: int) -> ScoredRows:
        p = rng.dirichlet([1, 1, 1], number)
        return ScoredRows(p, p, rng.integers(0, 2, number), np.ones(number))

    report = ReportConfig(bootstrap_repeats=10)
    for valid, test in ((60, 80), (0, 80), (60, 0), (0, 0)):
        splits = {"train": rows(100), "valid": rows(valid), "test": rows(test)}
        found = analysis_of(splits, ["a", "b", "never"], report, seed=0)
        assert found["positive_class"] in ("a", "b")
        assert found["reported_on"] == ("test" if test else "valid" if valid else "train")
        json.dumps(found, allow_nan=False)
    with pytest.raises(UserError, match="there is no class 'c'; there is a, b"):
        positive_class(ReportConfig(positive_class="c"), ["a", "b"], np.array([0]))


def test_models_beside_it_see_what_can_be_learned() -> None:
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"x": rng.normal(size=900), "kind": rng.choice(["a", "b"], 900), "empty": [None] * 900})
    targets = ((table["x"] > 0).to_numpy() ^ (table["kind"] == "b").to_numpy()).astype(np.int64)
    cut = {"train": slice(0, 500), "valid": slice(500, 700), "test": slice(700, 900)}
    tables = {name: typed(table)[part] for name, part in cut.items()}
    of_splits = {name: targets[part] for name, part in cut.items()}
    weights = {name: np.ones(len(rows)) for name, rows in of_splits.items()}
    found, missing = predictions_beside(tables, of_splits, weights, 3, seed=1)
    assert all(p.shape == (200, 3) and p.sum(1) == pytest.approx(np.ones(200)) for p in found.values())
    assert "LightGBM" in found or "LightGBM" in missing
    if "LightGBM" in found:
        assert (found["LightGBM"].argmax(1) == of_splits["test"]).mean() > 0.9


def test_types_of_columns() -> None:
    table = pl.DataFrame({"number": ["1.5", None], "code": ["1", "2"], "text": ["a", "1"], "yes": [True, False]})
    found = typed(table, ["code"])
    assert found.dtypes == [pl.Float64, pl.String, pl.String, pl.String]


def test_differences_are_named_by_place() -> None:
    before, after = {"a": [1.0, {"b": 2}], "c": None}, {"a": [1.0, {"b": 3}], "d": 1}
    assert list(differences(before, after)) == ["a.1.b: recorded 2, recomputed 3", "d: recorded null, recomputed 1"]
    assert list(differences([1, 2], [1])) == [": recorded [1, 2], recomputed [1]"]


def test_importance_and_dependence_say_what_the_rule_is(run: Path) -> None:
    """The grade follows income and debt; the region says nothing."""
    content = content_of(run)
    found = content["importance"]
    assert found["rows"] == "valid"
    assert found["count"] == content["rows"]["valid"]["rows"]
    by_name = {line["feature"]: line for line in found["columns"]}
    assert found["columns"][0]["feature"] == "income"
    assert by_name["income"]["loss"] > 0.02
    assert by_name["income"]["auroc"] > 0.02
    assert abs(by_name["region"]["loss"]) < by_name["income"]["loss"] / 3
    curves = {line["feature"]: line for line in content["dependence"]}
    assert set(curves) == {"income", "debt", "region"}
    income = curves["income"]
    assert income["mean"][0] > income["mean"][-1] + 0.1  # of <b>bad
    assert len(income["rows"][0]) == len(income["values"])
    assert curves["debt"]["values"][-1] is None  # missing cells have a place of their own
    assert set(curves["region"]["values"]) == {"north", "south"}
    assert {"importance", "dependence_1"} <= {file.stem for file in (run / "figures").glob("*.png")}


@pytest.mark.parametrize(
    "key", ["report.positive_class=ugly", "report.segments=[planet]", "report.dependence=[branch]"]
)
def test_a_wrong_name_is_refused_before_training(tmp_path: Path, key: str) -> None:
    found = command("train", *tiny_job(write_loans(tmp_path), tmp_path / "run", "data.drop=[branch]"), key)
    assert found.code == 2
    assert MISTAKES[key] in found.err
    assert not (tmp_path / "run").exists()
