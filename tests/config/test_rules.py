"""Rules that the types cannot say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dist_train.config.rules import dropout_pair, given_class_weights, problems_of
from dist_train.config.schema import JobConfig, ModelConfig, RuntimeConfig, TrainConfig
from dist_train.errors import UserError


def test_the_defaults_break_no_rule() -> None:
    assert problems_of(JobConfig()) == []


@pytest.mark.parametrize(("value", "pair"), [(0.5, (0.5, 0.5)), ([0.1, 0.2], (0.1, 0.2)), (0, (0.0, 0.0))])
def test_one_dropout_probability_means_both(value: Any, pair: tuple[float, float]) -> None:
    assert dropout_pair(ModelConfig(dropout=value)) == pair


@pytest.mark.parametrize(
    "value", [None, True, "0.5", [0.5], [0.1, 0.2, 0.3], [0.1, True], [0.1, 1.0], float("nan"), -0.1]
)
def test_another_dropout_is_refused(value: Any) -> None:
    assert [p for p in problems_of(JobConfig(model=ModelConfig(dropout=value))) if p.startswith("model.dropout: ")]


def test_shards_and_the_exact_mode_are_refused_together() -> None:
    sharded = JobConfig(runtime=RuntimeConfig(fsdp=True), train=TrainConfig(virtual_ranks=4))
    assert [problem.partition(":")[0] for problem in problems_of(sharded)] == ["runtime.fsdp"]


def test_only_the_exact_mode_is_audited() -> None:
    audited = JobConfig(runtime=RuntimeConfig(audit_every_steps=100))
    assert [problem.partition(":")[0] for problem in problems_of(audited)] == ["runtime.audit_every_steps"]
    assert not problems_of(replace(audited, train=TrainConfig(virtual_ranks=4)))
    never = JobConfig(runtime=RuntimeConfig(audit_every_steps=0), train=TrainConfig(virtual_ranks=4))
    assert [problem.partition(":")[0] for problem in problems_of(never)] == ["runtime.audit_every_steps"]


@pytest.mark.parametrize(("batch", "passes", "fits"), [(8, 4, True), (8, 5, False), (2, 1, True), (3, 2, False)])
def test_every_pass_has_two_rows(batch: int, passes: int, fits: bool) -> None:
    config = JobConfig(train=TrainConfig(global_batch_size=batch, accumulation_steps=passes))
    assert (problems_of(config) == []) == fits


@pytest.mark.parametrize(
    ("weights", "names", "listed"),
    [
        ({"low": 1, "high": 2.5}, ["high", "low"], [2.5, 1.0]),
        ({0: 1, 1: 2}, ["0", "1"], [1.0, 2.0]),
        ({True: 1, False: 2}, ["false", "true"], [2.0, 1.0]),
        ("balanced", ["a", "b"], None),
        (None, ["a", "b"], None),
    ],
)
def test_class_weights_are_listed_in_the_order_of_the_classes(
    weights: Any, names: list[str], listed: list[float] | None
) -> None:
    assert given_class_weights(TrainConfig(class_weights=weights), names) == listed


@pytest.mark.parametrize("weights", [{"low": 1}, {"low": 1, "high": 1, "mid": 1}, {"Low": 1, "high": 1}, {}])
def test_class_weights_of_other_classes_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"train\.class_weights: must have the classes high, low, has"):
        given_class_weights(TrainConfig(class_weights=weights), ["high", "low"])
