"""What the fuzzer found, and a few of its cases. All of them: `make fuzz`."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tests.fuzz.__main__ import outcome_of, try_case
from tests.fuzz.generate import Case

QUICK = range(100)


def test_the_first_cases_are_taken_or_refused_in_one_line() -> None:
    outcomes = {number: outcome_of(number) for number in QUICK}
    assert not {number: said for number, said in outcomes.items() if said.startswith("FAULT")}
    assert {"accepted", "refused: configuration", "refused: table"} <= set(outcomes.values())


def test_a_case_is_a_function_of_its_number() -> None:
    assert outcome_of(7) == outcome_of(7)


# Cases that broke something when they were found. They are kept by what they hold: a number means another case once the
# generator has changed.
def test_a_column_whose_name_has_a_null_character(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1.5, 2.5, 3.5] * 9, "\0": ["x", "y", "z"] * 9, "t": ["u", "v", "w"] * 9})
    frame.write_csv(tmp_path / "t.csv")
    arguments = [f"data.path={tmp_path / 't.csv'}", "data.target=t", "runtime.device=cpu"]
    assert try_case(Case(arguments, tmp_path / "t.csv", tmp_path / "t.csv"), tmp_path) in ("accepted", "refused: table")


@pytest.mark.parametrize(
    "argument",
    [f"schedule.min_lr_ratio={'1' * 400}", f"optim.lr=-{'9' * 400}", "data.drop=\\${x}", "data.formats={a: {b: c}}"],
)
def test_a_number_that_no_float_can_hold_and_text_that_is_no_list(argument: str, tmp_path: Path) -> None:
    assert try_case(Case([argument]), tmp_path) == "refused: configuration"


def test_folds_are_tried_as_train_trains_them_one_after_the_other(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1.5, 2.5, 3.5] * 30, "t": ["u", "v", "w"] * 30})
    frame.write_csv(tmp_path / "t.csv")
    arguments = [f"data.path={tmp_path / 't.csv'}", "data.target=t", "runtime.device=cpu", "data.folds=3"]
    assert try_case(Case(arguments, tmp_path / "t.csv", tmp_path / "t.csv"), tmp_path) == "accepted"


@pytest.mark.parametrize("units", [2**63, 2**20])
def test_a_model_that_no_memory_can_hold(units: int, tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1.5, 2.5, 3.5] * 30, "t": ["u", "v", "w"] * 30})
    frame.write_csv(tmp_path / "t.csv")
    arguments = [f"data.path={tmp_path / 't.csv'}", "data.target=t", "runtime.device=cpu", f"model.hidden_dim={units}"]
    said = try_case(Case(arguments, tmp_path / "t.csv", tmp_path / "t.csv"), tmp_path)
    assert said == ("refused: configuration" if units == 2**63 else "refused: table")
