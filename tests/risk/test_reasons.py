"""Integrated gradients of a row's log-odds, by the columns of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from dist_train import Classifier, UserError, load, register_model
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.determinism.arithmetic import Arithmetic
from dist_train.models.embeddings import TabularInputs
from dist_train.risk.calibration import Isotonic, Temperature, Vector
from dist_train.risk.reasons import ExplainedModel, effects_of, has_slopes, log_odds
from tests.cli.in_process import command, command_on_ranks
from tests.contracts.test_models import FAMILIES, build
from tests.models.specs import make_inputs, make_spec
from tests.resume.jobs import run_job, tiny_job

SPEC = make_spec(3, [4, 6, 300], num_flags=2, num_classes=3)
COLUMNS = [*SPEC.columns_of_inputs[0], *SPEC.columns_of_inputs[2]]


def typical(spec: FeatureSpec) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x[:1]) for x in make_inputs(spec, 2))


PROBABILITIES = Arithmetic().probabilities


def explained(
    model: nn.Module, spec: FeatureSpec = SPEC, probabilities: Callable[[Tensor], Tensor] = PROBABILITIES
) -> ExplainedModel:
    numbers, flagged, categories = spec.columns_of_inputs
    places = {name: place for place, name in enumerate([*numbers, *categories])}
    return ExplainedModel(model, probabilities, typical(spec), (numbers, flagged, None), places)


def trained_like(model: nn.Module) -> nn.Module:
    """A model whose outputs differ: as it was initialised they hardly do."""
    torch.manual_seed(3)
    model(*make_inputs(SPEC, 64, seed=9))  # BatchNorm has other statistics than 0 and 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def score(model: nn.Module, inputs: tuple[Tensor, ...], positive: int = 1) -> Tensor:
    with torch.no_grad():
        return log_odds(Arithmetic().probabilities(model(*inputs)), positive)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_effects_of_a_row_add_up(family: str) -> None:
    model, inputs = trained_like(build(family, SPEC)), make_inputs(SPEC, 30)
    effects, baseline = effects_of([explained(model)], [tuple(inputs)], len(COLUMNS), 1)
    own = score(model, tuple(inputs))
    assert own.std() > 0.05
    assert baseline == pytest.approx(float(score(model, typical(SPEC))[0]), abs=1e-5)
    assert (own - baseline - effects.sum(1)).abs().max() < 0.02
    same = inputs.codes[:, 0] == 0  # as in the typical row
    assert effects[same, COLUMNS.index("c0")].abs().max() == 0


def test_members_have_the_log_odds_of_their_mean_and_a_calibration_those_of_its_own() -> None:
    models = [trained_like(build("tabm", SPEC, seed)) for seed in (1, 2)]
    inputs = make_inputs(SPEC, 20)
    mean = torch.stack([Arithmetic().probabilities(m(*inputs)) for m in models]).mean(0).detach()
    for calibration in (None, Temperature(1.7), Vector((1.1, 0.8, 1.0), (0.1, 0.0, -0.2))):
        both = [explained(model) for model in models]
        effects, baseline = effects_of(both, [tuple(inputs)] * 2, len(COLUMNS), 2, calibration)
        shipped = mean if calibration is None else torch.from_numpy(calibration(mean.numpy()))
        assert (log_odds(shipped, 2) - baseline - effects.sum(1)).abs().max() < 0.02
    assert not has_slopes(Isotonic(((0.0, 1.0),), ((0.0, 1.0),)))


class Linear(nn.Module):
    """Logits (0, w x + b): the effect of a column is its weight times its way."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.inputs = TabularInputs(spec)
        self.linear = nn.Linear(self.inputs.width, 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        made = self.linear(self.inputs(*inputs))
        return torch.cat([torch.zeros_like(made), made], 1)


def test_a_linear_rule_has_the_effects_of_its_terms() -> None:
    spec = make_spec(3, [4, 6], num_flags=2, num_classes=2)
    model, inputs = Linear(spec), make_inputs(spec, 50)
    effects, _ = effects_of([explained(model, spec)], [tuple(inputs)], 5, 1)
    weights = model.linear.weight[0].detach()
    expected = torch.zeros(50, 5, dtype=torch.float64)
    expected[:, :3] = inputs.numeric * weights[:3]
    expected[:, :2] += inputs.flags * weights[3:5]
    for place, first, size in ((3, 5, 4), (4, 9, 6)):
        of_codes = weights[first : first + size]
        expected[:, place] = of_codes[inputs.codes[:, place - 3].long()] - of_codes[0]
    torch.testing.assert_close(effects, expected, rtol=0, atol=1e-5)


def test_captum_finds_the_same() -> None:
    """Its gradients of the layer that makes features of the inputs, at many points."""
    attr = pytest.importorskip("captum.attr")
    spec = make_spec(3, [4, 6], num_flags=2)
    model = build("financial_classifier", spec).eval()
    inputs = tuple(make_inputs(spec, 30))

    def forward(*given: Tensor) -> Tensor:
        return log_odds(Arithmetic().probabilities(model(*given)), 0)

    layers = attr.LayerIntegratedGradients(forward, model.inputs)
    base = tuple(x.expand(30, -1) for x in typical(spec))
    theirs = layers.attribute(inputs, base, n_steps=512, method="gausslegendre").double()
    names: list[str] = model.inputs.output_columns  # type: ignore[assignment, union-attr]
    columns = ["x0", "x1", "x2", "c0", "c1"]
    by_column = torch.stack([theirs[:, [n == name for n in names]].sum(1) for name in columns], 1)
    ours, _ = effects_of([explained(model, spec)], [inputs], 5, 0)
    torch.testing.assert_close(ours, by_column.detach(), rtol=0, atol=0.01)


class CodesOfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        return self.embedding(codes[:, 0].long()) + numeric.sum() + flags.sum()  # type: ignore[no-any-return]


def test_a_model_that_reads_codes_by_itself_is_refused() -> None:
    with pytest.raises(UserError, match="TabularInputs"):
        explained(CodesOfItsOwn(), make_spec(0, [4], num_classes=2))


def loans(rows: int = 600) -> pl.DataFrame:
    """`bad` follows debt, falls with income where it is known, and is frequent in one region; `noise` says nothing."""
    rng = np.random.default_rng(4)
    income, debt, noise = rng.normal(size=(3, rows))
    region = rng.choice(["north", "south", "west"], rows)
    odds = 2.5 * debt - 1.5 * income + 3.0 * (region == "west") - 1
    grade = np.where(rng.random(rows) < 1 / (1 + np.exp(-odds)), "bad", "good")
    income[::10] = np.nan
    columns = {"income": income, "debt": debt, "noise": noise, "region": region, "grade": grade}
    return pl.DataFrame(columns).fill_nan(None)


@register_model("linear_rule_for_reasons")
def build_linear(spec: FeatureSpec, _: Any) -> nn.Module:
    return Linear(spec)


@pytest.fixture(scope="module")
def linear() -> Classifier:
    table = loans(1500)
    overrides = ["report.positive_class=bad", "optim.weight_decay=0.0"]
    return Classifier(
        model="linear_rule_for_reasons", epochs=15, learning_rate=0.1, device="cpu", overrides=overrides
    ).fit(table.drop("grade"), table["grade"])


def test_a_known_rule_has_the_right_reasons(linear: Classifier) -> None:
    table = pl.DataFrame(
        {"income": [2.0, -2.5, 0.0, None], "debt": [2.5, 0.0, -2.0, 0.0], "noise": [0.0] * 4,
         "region": ["north", "south", "west", "north"]},
    )  # fmt: skip
    found = linear.explain(table)
    assert found.positive == "bad"
    assert np.abs(found.errors).max() < 1e-5
    reasons = found.reasons(2)
    assert reasons["reason_1"].to_list()[:3] == ["debt", "income", "region"]
    effects = dict(zip(found.columns, found.effects.T, strict=True))
    assert effects["income"][0] < 0 < effects["income"][1]
    assert effects["debt"][2] < 0
    assert np.abs(effects["noise"]).max() < 0.2
    assert effects["income"][3] != 0  # the effect of a missing cell
    shown = reasons.select(pl.sum_horizontal(pl.exclude("log_odds", "reason_1", "reason_2")))
    np.testing.assert_allclose(shown.to_series().to_numpy(), reasons["log_odds"].to_numpy(), atol=1e-9)
    p = linear.predict_proba(table)[:, list(linear.classes_).index("bad")]
    np.testing.assert_allclose(np.log(p / (1 - p)), found.log_odds, atol=1e-9)


@pytest.mark.slow  # shap takes ten seconds to import
def test_shap_finds_the_same_for_a_rule_without_interactions(linear: Classifier) -> None:
    """Shapley values against one background row: of a sum they are its terms."""
    shap = pytest.importorskip("shap")
    names = ["income", "debt", "noise", "region"]
    rows = loans(1500).drop("grade").drop_nulls().head(8)
    medians = loans(1500)["income"].median()  # of nearly the training rows: differences are of the sampling
    regions = ["north", "south", "west"]
    codes = rows.with_columns(pl.col("region").replace_strict({r: i for i, r in enumerate(regions)})).to_numpy()
    assert medians is not None

    def of_numbers(given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        table = pl.DataFrame(given, schema=names).with_columns(
            pl.col("region").map_elements(lambda i: regions[int(i)], return_dtype=pl.String)
        )
        return linear.explain(table).log_odds

    theirs = shap.PermutationExplainer(of_numbers, codes[:1])(codes[1:], max_evals=60, silent=True).values
    effects = linear.explain(rows).effects
    order = [linear.explain(rows).columns.index(name) for name in names]
    np.testing.assert_allclose((effects[1:] - effects[:1])[:, order], theirs, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reasons")
    loans().write_csv(folder / "loans.csv")
    arguments = tiny_job(folder / "loans.csv", folder / "run", "train.max_steps=40", "evaluation.batch_size=64")
    assert run_job([*arguments, "train.early_stopping_patience=null"]).codes == [0]
    return folder / "run"


def test_predict_writes_reasons_and_every_number_of_ranks_the_same(run: Path, tmp_path: Path) -> None:
    source = run.parent / "loans.csv"
    found = command("predict", run, source, tmp_path / "one.csv", "--reasons", "4")
    assert found.code == 0, found.err
    assert '"reasons": {"class": "bad", "calibrated": ' in found.out
    ranks = command_on_ranks(2, "predict", run, source, tmp_path / "two.csv", "--reasons", "4")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    rows = pl.read_csv(tmp_path / "one.csv")
    assert rows.columns[3:7] == ["log_odds", "baseline_log_odds", "reason_1", "effect_1"]
    assert rows.columns[-2:] == ["other_effects", "reasons_error"]
    assert rows["reasons_error"].abs().max() < 0.02  # type: ignore[operator]
    effects = [name for name in rows.columns if name.startswith("effect_")]
    total = rows.select(pl.sum_horizontal("baseline_log_odds", *effects, "other_effects", "reasons_error")).to_series()
    assert (total - rows["log_odds"]).abs().max() < 1e-9  # type: ignore[operator]
    p = rows["probability_bad"]
    assert ((p / (1 - p)).log() - rows["log_odds"]).abs().max() < 1e-9  # type: ignore[operator]
    probabilities = [name for name in rows.columns if name.startswith("probability_")]
    assert command("predict", run, source, tmp_path / "plain.csv").code == 0
    assert pl.read_csv(tmp_path / "plain.csv").select(probabilities).equals(rows.select(probabilities))


def test_reasons_for_another_class_and_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    predictor = load(run)
    bad, good = (predictor.explain(loans(20).drop("grade"), name) for name in ("bad", "good"))
    np.testing.assert_allclose(bad.effects, -good.effects, atol=1e-4)
    assert (good.reasons(9)["reason_1"].null_count()) < 20
    with pytest.raises(UserError, match="there is no class 'ugly'; there is bad, good"):
        predictor.explain(loans(2), "ugly")
    scored = (run, run.parent / "loans.csv", tmp_path / "x.csv")
    found = command("predict", *scored, "--checkpoint", "last", "--reasons", 1)
    assert found.code == 2
    assert "--reasons-for" in found.err
    assert command("predict", *scored, "--reasons-for", "bad").code == 2


def test_a_reason_is_a_column_that_raises_the_log_odds() -> None:
    from dist_train.run.scoring.explanation import Explanation

    effects = np.array([[0.5, -1.0, 0.2], [-0.1, -0.2, -0.3]])
    found = Explanation("bad", True, ["a", "b", "c"], 0.25, np.array([0.0, -0.35]), effects)
    table = found.reasons(5)
    assert table["reason_1"].to_list() == ["a", None]
    assert table["effect_2"].to_list() == [0.2, None]
    assert table["reason_3"].null_count() == 2
    assert table["other_effects"].to_list() == pytest.approx([-1.0, -0.6])
    assert table["reasons_error"].to_list() == pytest.approx([0.05, 0.0])
    assert dataclasses.is_dataclass(found)
