"""Keys set to `auto`: which of them are, and the values that follow from a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config.auto import RULE, TableSize, chosen_values, with_auto_values
from dist_train.config.load import config_to_yaml, load_config, read_config
from dist_train.errors import UserError
from tests.commands import REPOSITORY

SIZES = st.builds(
    TableSize,
    rows=st.integers(2, 10**10),
    num_numeric=st.integers(0, 5000),
    category_sizes=st.lists(st.integers(2, 10**6), max_size=50).map(tuple),
    num_classes=st.integers(2, 1000),
)
SMALL = TableSize(rows=350, num_numeric=4, category_sizes=(), num_classes=2)
BUILT_IN = TableSize(rows=17_979, num_numeric=17, category_sizes=(4, 6, 5), num_classes=3)
LARGE = TableSize(rows=1_000_000, num_numeric=50, category_sizes=(5000,), num_classes=2)
ALL_AUTO = load_config(["model.name=tabm", *(f"{key}=auto" for key in RULE)])
ANY_TABLE = str(REPOSITORY / "configs" / "any_table.yaml")
KEYS = ["train.epochs", "train.global_batch_size"]


def test_the_last_of_several_settings_counts() -> None:
    auto = ["train.epochs=auto", "train.global_batch_size=auto"]
    assert load_config(auto).task.auto == KEYS
    assert load_config([*auto, "train.epochs=5"]).task.auto == ["train.global_batch_size"]
    assert load_config(["train.epochs=5", *auto]).task.auto == KEYS
    assert load_config(["train.epochs=7"], base=load_config(auto)).task.auto == ["train.global_batch_size"]
    assert load_config(["optim.lr=0.1"], base=load_config(auto)).task.auto == KEYS


def test_other_keys_have_no_auto() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep='auto'"):
        load_config(["checkpoint.keep=auto"])
    with pytest.raises(UserError, match="write auto as the value of each key"):
        load_config(["task.auto=[train.epochs]"])


def test_values_are_written_and_read_as_numbers(tmp_path: Path) -> None:
    given = load_config([f"{key}=auto" for key in KEYS])
    resolved = with_auto_values(given, BUILT_IN)
    assert resolved.task.auto == []
    assert chosen_values(given, resolved) == {key: RULE[key](BUILT_IN) for key in KEYS}
    file = tmp_path / "config.yaml"
    for config in (given, resolved):
        file.write_text(config_to_yaml(config))
        assert read_config(file) == config


def test_values_that_do_not_go_with_a_given_one_are_a_mistake() -> None:
    config = load_config(["train.global_batch_size=auto", "train.accumulation_steps=64"])
    with pytest.raises(UserError, match=r"350 training rows: train\.accumulation_steps"):
        with_auto_values(config, SMALL)


@settings(deadline=None, max_examples=25)
@given(SIZES)
def test_every_table_gets_a_valid_configuration(size: TableSize) -> None:
    assert with_auto_values(ALL_AUTO, size) == with_auto_values(ALL_AUTO, size)


def test_larger_tables_have_larger_batches_wider_layers_and_fewer_epochs() -> None:
    for key in ("train.global_batch_size", "model.tabm.width"):
        sizes = [RULE[key](size) for size in (SMALL, BUILT_IN, LARGE)]
        assert sizes == sorted(sizes)
    epochs = [RULE["train.epochs"](size) for size in (SMALL, BUILT_IN, LARGE)]
    assert epochs == sorted(epochs, reverse=True)


def test_columns_together_stay_narrow() -> None:
    widths = [RULE["model.tabm.numeric_width"](replace(LARGE, num_numeric=count)) for count in (0, 17, 33, 65, 5000)]
    assert widths == [8, 8, 4, 2, 2]


def test_keys_of_a_family_that_is_not_chosen_are_left_out() -> None:
    assert load_config([ANY_TABLE]).task.auto == sorted(RULE)
    other = load_config([ANY_TABLE, "model.name=financial_classifier"])
    assert other.task.auto == sorted(key for key in RULE if not key.startswith("model."))


def test_the_default_for_any_table_has_a_value_for_every_key_of_the_rule() -> None:
    """docs/any-table.md lists the same values."""
    resolved = with_auto_values(load_config([ANY_TABLE]), BUILT_IN)
    assert (resolved.train.global_batch_size, resolved.train.epochs, resolved.schedule.warmup_steps) == (256, 18, 63)
