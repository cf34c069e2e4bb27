"""Command line and YAML files -> one frozen object, or every mistake at once."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train import plugins
from dist_train.config import families
from dist_train.config.compatibility import ADDED, RENAMED
from dist_train.config.load import config_to_yaml, load_config, read_config
from dist_train.config.schema import JobConfig, ModelConfig
from dist_train.errors import UserError
from dist_train.models.registry import build_model
from tests.models.specs import make_spec


def mistakes(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    return str(caught.value)


def yaml_file(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_without_arguments_all_values_are_the_defaults() -> None:
    assert load_config([]) == JobConfig()


def test_later_files_win_over_earlier_ones_and_the_command_line_over_all(tmp_path: Path) -> None:
    first = yaml_file(tmp_path, "a.yaml", "optim: {lr: 0.1, eps: 1.0e-3}\ntrain: {epochs: 3}\n")
    second = yaml_file(tmp_path, "b.yaml", "optim: {lr: 0.2}\n")
    config = load_config(["train.epochs=5", first, "optim.weight_decay=0.5", second, "train.epochs=6"])
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (0.2, 1e-3, 0.5)
    assert config.train.epochs == 6
    assert load_config([second, first]).optim.lr == 0.1


def test_lists_replace_and_mappings_merge(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "a.yaml", "data: {drop: [a, b]}\ntrain: {class_weights: {low: 1, high: 2}}\n")
    config = load_config([file, "data.drop=[c]", "train.class_weights.high=3"])
    assert config.data.drop == ["c"]
    assert config.train.class_weights == {"low": 1, "high": 3}
    assert load_config([file, "train.class_weights=balanced"]).train.class_weights == "balanced"
    assert load_config([file, "train.class_weights=null"]).train.class_weights is None


def test_an_empty_mapping_empties(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "a.yaml", "model: {name: causal_lm, causal_lm: {answers: {'0': bad}}}\n")
    text = ["task.name=instruction", "data.path=x.csv", "model.causal_lm.instruction='{text}'"]
    emptied = load_config([file, *text, "model.causal_lm.answers={}"]).model
    assert families.block_of(emptied).answers == {}
    anew = load_config([file, *text, "model.causal_lm.answers={}", "model.causal_lm.answers.low=worse"]).model
    assert families.block_of(anew).answers == {"low": "worse"}
    other = yaml_file(tmp_path, "b.yaml", "data: {}\ntrain: {epochs: 3}\nmodel: {causal_lm: {answers: {}}}\n")
    config = load_config([file, *text, other])
    assert (config.data.path, config.train.epochs, families.block_of(config.model).answers) == ("x.csv", 3, {})


@pytest.mark.parametrize(
    ("argument", "section", "key", "value"),
    [
        ("optim.lr=1e-3", "optim", "lr", 1e-3),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("optim.max_grad_norm=null", "optim", "max_grad_norm", None),
        ("train.max_steps=7", "train", "max_steps", 7),
        ("run.name=2024-01-01", "run", "name", "2024-01-01"),
        ("run.name='null'", "run", "name", "null"),
        ("run.dir=a=b", "run", "dir", "a=b"),
        ("run.dir=runs/x.yaml", "run", "dir", "runs/x.yaml"),
        ("run.force=yes", "run", "force", True),
        ("model.dropout=0.5", "model", "dropout", 0.5),
        ("model.dropout=[0,0]", "model", "dropout", [0, 0]),
        ("data.missing_values=[NA,-1]", "data", "missing_values", ["NA", "-1"]),
        ("data.drop=[]", "data", "drop", []),
        ("data.target='a, b: c'", "data", "target", "a, b: c"),
        ("data.target=größe", "data", "target", "größe"),
        ("train.class_weights={0: 1, 1: 2.5}", "train", "class_weights", {"0": 1, "1": 2.5}),
    ],
)
def test_values_mean_what_yaml_says(argument: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(load_config([argument]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_a_value_can_refer_to_another() -> None:
    assert load_config(["run.name=lr_${optim.lr}", "optim.lr=0.25"]).run.name == "lr_0.25"


def test_the_result_is_frozen() -> None:
    config = load_config(["optim.lr=0.1"])
    with pytest.raises(FrozenInstanceError):
        config.optim.lr = 0.2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.optim = config.optim  # type: ignore[misc]


def test_two_configurations_share_nothing_that_can_change() -> None:
    first, second = load_config([]), load_config([])
    first.data.drop.append("x")
    assert second.data.drop == JobConfig().data.drop == []


def test_all_mistakes_are_listed_at_once_in_order_of_what_finds_them(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "a.yaml", "optim: {lrr: 1, lr: -1}\nmodle: {name: x}\n")
    text = mistakes(file, "nowhere.yaml", "train.epochs=two", "model.dropout=1.5", "word", "checkpoint.keep=0")
    lines = text.splitlines()
    assert lines[0] == "8 mistakes in the configuration:"
    for line, parts in zip(
        lines[1:],
        [
            ("a.yaml", "'optim.lrr'", "Did you mean"),
            ("a.yaml", "'modle'", "Did you mean", "model"),
            ("nowhere.yaml", "no such file"),
            ("train.epochs", "two"),
            ("'word'", "key=value"),
            ("model.dropout", "1.5"),
            ("optim.lr", "-1"),
            ("checkpoint.keep", "0"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), text


def test_one_mistake_is_one_line() -> None:
    assert mistakes("optim.lr=nan") == "optim.lr: must be finite and above 0, is nan"


def test_a_key_without_its_section_is_answered_with_the_section() -> None:
    assert "'optim.lr'" in mistakes("lr=1")
    assert "'evaluation.every_steps' or 'checkpoint.every_steps' or 'log.every_steps'" in mistakes("every_steps=3")


NUMBERS = [
    f"{section.name}.{key}"
    for section in fields(JobConfig)
    for key, value in asdict(JobConfig())[section.name].items()
    if isinstance(value, (int, float)) and not isinstance(value, bool)
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "many", "[1]", "null", "true"])
def test_no_number_takes_what_is_none(key: str, value: str) -> None:
    if (key, value) == ("optim.max_grad_norm", "null"):
        return  # means: not clipped
    assert key in mistakes(f"{key}={value}")


def resolved() -> st.SearchStrategy[list[str]]:
    names = st.text(st.characters(codec="utf-8", exclude_characters="/\\${}"), min_size=1, max_size=20)
    texts = names.filter(lambda t: t.strip() and t not in {".", "..", "???"} and "\0" not in t)
    quoted = texts.map(lambda t: "'" + t.replace("'", "''") + "'").filter(lambda t: t.isprintable())
    unit = st.floats(0, 0.99)
    return st.tuples(
        quoted.map(lambda t: f"run.name={t}"),
        st.integers(0, 2**63 - 1).map(lambda n: f"run.seed={n}"),
        st.floats(1e-30, 1e30).map(lambda x: f"optim.lr={x!r}"),
        st.tuples(unit, unit).map(lambda p: f"model.dropout=[{p[0]!r}, {p[1]!r}]"),
        st.lists(quoted, max_size=3, unique=True).map(lambda names: f"data.missing_values=[{', '.join(names)}]"),
        st.dictionaries(st.integers(0, 9), st.floats(0.1, 9), max_size=3).map(
            lambda d: "train.class_weights={" + ", ".join(f"{k}: {v!r}" for k, v in d.items()) + "}"
        ),
    ).map(list)


@settings(deadline=None, max_examples=30)
@given(resolved())
def test_config_yaml_reads_back_as_the_same_object(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str]
) -> None:
    config = load_config(arguments)
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert read_config(path) == config


@pytest.mark.parametrize("name", ["1e5", "0E0", "1_0", "+1e3", "0x1F", "1:30", "nan", "on", "null", "2024-01-01", "é"])
def test_a_name_that_looks_like_something_else_stays_a_name(tmp_path: Path, name: str) -> None:
    config = load_config([f"run.name='{name}'"])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert read_config(tmp_path / "config.yaml").run.name == name


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["optim.lr", "optim", "model.dropout", "train.class_weights", "data.drop", "run.name", "x", ""]),
    st.text(max_size=12),
)
def test_whatever_is_typed_is_taken_or_refused_in_words(key: str, value: str) -> None:
    said = "taken"
    try:
        load_config([f"{key}={value}"])
    except UserError as refused:
        said = str(refused)
    assert said
    assert all(line.isprintable() for line in said.split("\n")), repr(said)


def test_every_shipped_configuration_loads() -> None:
    folder = Path(__file__).parents[2] / "configs"
    files = [str(path) for path in sorted(folder.glob("*.yaml"))]
    assert files
    for file in files:
        load_config([file])
    assert load_config([f"{folder}/credit_risk.yaml", f"{folder}/debug.yaml"]).run.name == "debug"


def test_an_old_run_keeps_the_defaults_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADDED, "optim.eps", 1e-6)
    monkeypatch.setitem(RENAMED, "optim.rate", "optim.lr")
    path = tmp_path / "config.yaml"
    path.write_text("optim: {rate: 0.5}\n")
    assert (read_config(path).optim.eps, read_config(path).optim.lr) == (1e-6, 0.5)
    mine = load_config([str(path)])  # as a configuration of a new run
    assert (mine.optim.eps, mine.optim.lr) == (1e-8, 0.5)
    assert load_config(["optim.rate=0.25"]).optim.lr == 0.25


def test_keys_of_a_newer_version_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim: {lr: 0.5, nesterov: true}\nfuture: {a: 1, b: 2}\n")
    expected = r"config\.yaml: this version of dist_train does not know the keys future\.a, future\.b, optim\.nesterov"
    with pytest.raises(UserError, match=expected) as refused:
        read_config(path)
    assert "\n" not in str(refused.value)


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    width: int = 3
    names: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.width < 1:
            yield "width", f"must be at least 1, is {self.width}"


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})
    families.register_block("linear", LinearConfig)


@pytest.mark.usefixtures("linear")
def test_a_family_has_a_block_of_keys(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "a.yaml", "model: {name: linear, linear: {width: 7}}\n")
    model = load_config([file, "model.linear.names=[a]", "model.hidden_dim=5"]).model
    assert families.block_of(model) == LinearConfig(width=7, names=["a"])
    assert model.hidden_dim == 5
    config = load_config([file])
    again = yaml_file(tmp_path, "b.yaml", config_to_yaml(config))
    assert read_config(Path(again)) == config
    assert pickle.loads(pickle.dumps(config)) == config  # as it is sent to other ranks
    with pytest.raises(FrozenInstanceError):
        families.block_of(model).width = 3


@pytest.mark.usefixtures("linear")
def test_a_configuration_has_no_blocks_of_families_that_it_does_not_choose() -> None:
    assert load_config([]) == JobConfig()
    assert load_config(["model.linear.width=7"]) == JobConfig()
    assert families.block_of(JobConfig().model) == ModelConfig()


@pytest.mark.usefixtures("linear")
def test_mistakes_in_a_block_are_told_like_others() -> None:
    text = mistakes(
        "model.name=linear", "model.linear.widht=7", "model.linear.width=x", "model.linear=4", "model.gpt.k=3"
    )
    assert "unknown key 'model.linear.widht'. Did you mean: 'width'?" in text
    assert "model.linear.width='x': Value 'x' of type 'str' could not be converted to Integer" in text
    assert "model.linear=4: is a section: set its keys, as in model.linear.KEY=value" in text
    assert "unknown key 'model.gpt'" in text
    assert mistakes("model.name=linear", "model.linear.width=0") == "model.linear.width: must be at least 1, is 0"


@pytest.mark.usefixtures("linear")
def test_an_unknown_model_names_the_known_ones() -> None:
    known = ", ".join([*families.BUILT_IN, *families.OF_TEXT, "linear"])
    expected = f"model.name: there is no model 'gpt'; there is {known}"
    assert mistakes("model.name=gpt") == expected


@pytest.mark.parametrize("name", ["dropout", "two words", "financial_classifier"])
def test_a_block_cannot_take_the_name_of_another_key(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        families.register_block(name, LinearConfig)


def test_a_family_of_an_installed_package_is_imported_when_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other_models.py").write_text(
        "from dataclasses import dataclass\nfrom torch import nn\n"
        "from dist_train.models.registry import register_model\n"
        "@dataclass(frozen=True, kw_only=True)\nclass FlatConfig:\n    scale: float = 2.0\n"
        "@register_model('flat', FlatConfig)\n"
        "def build(spec, config):\n    return nn.Linear(spec.num_numeric, int(config.scale))\n"
    )
    info = tmp_path / "other_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dist_train.models]\nflat = other_models:build\ngone = no_such_module\n")
    monkeypatch.setattr(families, "_registered", {})
    monkeypatch.syspath_prepend(tmp_path)
    plugins.declared.cache_clear()
    try:
        assert load_config([]) == JobConfig()
        assert "other_models" not in sys.modules
        assert "flat" in mistakes("model.name=gpt")
        assert "other_models" not in sys.modules
        model = load_config(["model.name=flat", "model.flat.scale=3"]).model
        assert "other_models" in sys.modules
        assert build_model(make_spec(4), model, seed=0).get_parameter("weight").shape == (3, 4)
        assert mistakes("model.name=gone").startswith(
            "model.name: the model 'gone' of an installed package (no_such_module) cannot be loaded: "
        )
    finally:
        plugins.declared.cache_clear()
        sys.modules.pop("other_models", None)
