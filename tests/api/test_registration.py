"""Metrics, losses, tasks and models from outside the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_train import Classifier, UserError, load, register_loss, register_metric, register_task
from dist_train.config.schema import TrainConfig
from dist_train.training.loss import CrossEntropy, RegisteredLoss, objective_of
from tests.api.tables import loans, quick
from tests.cli.in_process import command_on_ranks
from tests.programs import output_of


def fit_with(metric: str, **arguments: Any) -> Classifier:
    return quick(overrides=[f"evaluation.metrics=[{metric}]"], **arguments).fit(*loans())


def test_a_metric_is_in_every_evaluation(tmp_path: Path) -> None:
    @register_metric("share_of_first")
    def share_of_first(probabilities: Any, targets: Any, class_names: Any) -> Any:
        assert probabilities.shape == (len(targets), len(class_names))
        return (targets == 0).mean()

    classifier = fit_with("share_of_first", run_dir=tmp_path / "run")
    found = classifier.summary_["valid"]["share_of_first"]
    assert 0 < found < 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["share_of_first"] for line in lines if line["split"] == "valid"] == [found]
    assert load(tmp_path / "run").evaluate("valid")["share_of_first"] == found


@pytest.mark.parametrize(
    ("result", "written"), [(float("nan"), None), (None, None), (3, 3), ({"a": [1.5]}, {"a": [1.5]}), (True, True)]
)
def test_a_metric_is_a_json_value(result: Any, written: Any) -> None:
    register_metric("anything")(lambda *_: result)
    assert fit_with("anything").summary_["valid"]["anything"] == written


def test_a_mistake_in_a_metric_is_one_line() -> None:
    @register_metric("broken")
    def broken(*_: Any) -> float:
        return 1 / 0

    with pytest.raises(UserError) as told:
        fit_with("broken")
    assert str(told.value) == "evaluation.metrics: the metric 'broken' failed: ZeroDivisionError: division by zero"
    register_metric("broken")(lambda *_: {1, 2})
    with pytest.raises(UserError, match="the metric 'broken' gave no JSON value"):
        fit_with("broken")
    register_metric("broken")(lambda probabilities, *_: probabilities.sort())
    with pytest.raises(UserError, match="the metric 'broken' failed: ValueError: sort array is read-only"):
        fit_with("broken")


@pytest.mark.parametrize("name", ["loss", "auroc", "step", ""])
def test_names_that_a_metric_cannot_have(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a metric"):
        register_metric(name)(lambda *_: 0.0)


def test_a_metric_of_another_program_is_left_out(tmp_path: Path) -> None:
    register_metric("passing")(lambda *_: 0.5)
    fit_with("passing", run_dir=tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    assert "passing" in file.read_text()
    (other,) = command_on_ranks(1, "evaluate", tmp_path / "run", "--split", "valid")
    assert other.code == 0, other.err
    assert "left out, because this program has not registered them: the metrics passing" in other.err
    assert "passing" not in json.loads(other.out)["valid"]


def row_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("members", [0, 1, 3])
@pytest.mark.parametrize("slices", [(6,), (4, 0, 2)], ids=str)
def test_a_registered_loss_is_summed_as_cross_entropy_is(weighted: bool, members: int, slices: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (6, members, 3) if members else (6, 3)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 1, 0, 0])
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) if weighted else None
    own = RegisteredLoss("own", row_cross_entropy, weights)(logits, targets, slices)
    expected = CrossEntropy(weights)(logits, targets, slices)
    torch.testing.assert_close(own.loss, expected.loss)
    torch.testing.assert_close(own.weight, expected.weight.to(own.weight.dtype))
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (own.loss, expected.loss)]
    torch.testing.assert_close(*gradients)


def test_a_loss_from_outside_trains() -> None:
    @register_loss("brier")
    def brier(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (logits.softmax(1) - F.one_hot(targets, logits.shape[1])).square().sum(1)

    table, risk = loans()
    exact = [
        quick(epochs=20, batch_size=16, overrides=["train.loss=brier", f"train.virtual_ranks={v}"]).fit(table, risk)
        for v in (1, 4)
    ]
    assert exact[0].summary_["valid"]["loss"] < 1.05
    assert exact[1].predict_proba(table) == pytest.approx(exact[0].predict_proba(table), abs=0.1)


def test_mistakes_in_a_loss() -> None:
    register_loss("mean")(lambda logits, targets: row_cross_entropy(logits, targets).mean())
    with pytest.raises(UserError, match=r"the loss 'mean' must give one number a row, \(16,\), not \(\)"):
        quick(overrides=["train.loss=mean"]).fit(*loans())
    register_loss("broken")(lambda logits, targets: logits[targets, 7])
    with pytest.raises(UserError, match=r"train\.loss: the loss 'broken' failed: IndexError"):
        quick(overrides=["train.loss=broken"]).fit(*loans())
    with pytest.raises(UserError, match="label_smoothing: only cross_entropy has it"):
        objective_of(TrainConfig(loss="mean", label_smoothing=0.1), None)
    with pytest.raises(ValueError, match="cannot name a loss"):
        register_loss("cross_entropy")(row_cross_entropy)


def test_names_of_tasks() -> None:
    with pytest.raises(ValueError, match="cannot name a task"):
        register_task("tabular")(object)  # type: ignore[type-var]


INSTALLED = """
import sys
from dist_train import Classifier, load_config
print("extras" in sys.modules)
config = load_config(overrides=["model.name=linear", "train.loss=squared", "evaluation.metrics=[zero]"])
import numpy as np
X = np.random.default_rng(0).normal(size=(60, 2))
fitted = Classifier(epochs=1, device="cpu", overrides=[
    "model.name=linear", "train.loss=squared", "evaluation.metrics=[zero]", "task.name=other"]).fit(X, X[:, 0] > 0)
print(fitted.summary_["valid"]["zero"], fitted.summary_["parameters"])
try:
    Classifier(epochs=1, overrides=["evaluation.metrics=[gone]"]).fit(X, X[:, 0] > 0)
except ValueError as error:
    print(error)
"""
EXTRAS = """
import torch
from torch import nn
from dist_train import TabularInputs, register_model
from dist_train.tasks.tabular import TabularTask

@register_model("linear")
def linear(spec, config):
    inputs = TabularInputs(spec)
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.inputs, self.layer = inputs, nn.Linear(inputs.width, spec.num_classes)
        def forward(self, *rows):
            return self.layer(self.inputs(*rows))
    return Linear()

def squared(logits, targets):
    return (logits - nn.functional.one_hot(targets, logits.shape[1])).square().sum(1)

def zero(probabilities, targets, class_names):
    return 0.0

class OtherTask(TabularTask):
    def description(self):
        return super().description() | {"task": "other"}
"""
ENTRY_POINTS = """
[dist_train.models]
linear = extras:linear
[dist_train.losses]
squared = extras:squared
[dist_train.metrics]
zero = extras:zero
gone = extras:gone
[dist_train.tasks]
other = extras:OtherTask
"""


def test_installed_packages_are_found_by_their_entry_points(tmp_path: Path) -> None:
    (tmp_path / "extras.py").write_text(EXTRAS)
    info = tmp_path / "extras-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extras\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    assert output_of(INSTALLED, tmp_path).splitlines() == [
        "False",
        "0.0 6",
        "evaluation.metrics: the metric 'gone' of an installed package (extras:gone) cannot be loaded: "
        "AttributeError: module 'extras' has no attribute 'gone'",
    ]
