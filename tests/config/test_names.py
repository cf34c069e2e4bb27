"""What people type as a name stays what they typed, and can be read back from config.yaml."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from dist_train.config.load import config_from_tree, config_to_yaml, is_setting, load_config, read_config
from dist_train.config.rules import given_class_weights
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError

NAMES = [
    "007", "1.10", "20240131_1200", "12e4567", "1e3", "1:30", "12:30:45", "yes", "No", "on", "true", "null", "Null",
    "0x1F", "0b1", "1_000", "+5", ".5", "5.", ".inf", "nan", "=", "<<", "2024-01-31", "0x_", "-", "---", "[a]", "{a}",
    "a: b", "a #b", "*a", "&a", "!a", "@a", "%a", "`a`", "|", ">", "lr=0.1", "a,b", "it's", "$5", "50%", "a\\b",
]  # fmt: skip


def mistakes(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    return str(caught.value)


def read_back(config: JobConfig, folder: Path) -> JobConfig:
    (folder / "config.yaml").write_text(config_to_yaml(config))
    return read_config(folder / "config.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_the_command_line_is_the_text_that_was_typed(name: str, tmp_path: Path) -> None:
    config = load_config([f"data.target={name}", f"data.split_column={name}x"])
    assert (config.data.target, config.data.split_column) == (name, f"{name}x")
    assert read_back(config, tmp_path) == config


@pytest.mark.parametrize("name", NAMES[:25])
def test_a_name_in_a_file_and_in_a_list_is_the_text_that_was_typed(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"run:\n  name: {name}\ndata:\n  drop:\n    - {name}\n")
    config = load_config([str(file), f"data.categorical=[a, {name}x, b]", f"data.missing_values=[{name}]"])
    assert (config.run.name, config.data.drop, config.data.categorical[1]) == (name, [name], f"{name}x")
    assert config.data.missing_values == [name]
    assert read_back(config, tmp_path) == config


@pytest.mark.parametrize("name", ["yes", "no", "007", "01", "1.50", "null", "12:30", "A.B", "[low]", "${x}", "\\${x}"])
def test_a_class_keeps_the_name_that_was_typed(name: str, tmp_path: Path) -> None:
    config = load_config([f"train.class_weights.{name}=2", "train.class_weights.other=1"])
    assert given_class_weights(config.train, ["other", name]) == [1.0, 2.0]
    assert read_back(config, tmp_path) == config
    file = tmp_path / "a.yaml"
    file.write_text(
        f"train:\n  class_weights:\n    {name!r}: 2\n    other: 1\n".replace("'", "" if name[0] != "[" else "'")
    )
    if "\\" not in name:
        assert given_class_weights(load_config([str(file)]).train, ["other", name]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("typed", "classes"),
    [
        ("{yes: 2, no: 1}", ["true", "false"]),
        ("{True: 2, False: 1}", ["true", "false"]),
        ("{0x1: 2, 00: 1}", ["1", "0"]),
    ],
)
def test_a_class_is_found_by_what_yaml_reads_where_none_has_the_name(typed: str, classes: list[str]) -> None:
    assert given_class_weights(load_config([f"train.class_weights={typed}"]).train, classes) == [2.0, 1.0]


def test_nothing_is_nothing_only_where_nothing_is_allowed() -> None:
    for word in ("null", "~", ""):
        assert load_config([f"data.split_column={word}"]).data.split_column is None
    assert load_config(["data.split_column='null'"]).data.split_column == "null"
    assert mistakes("run.name=") == "command line: run.name: must have a value, is empty"


@pytest.mark.parametrize("text", ["${x}", "a${run.name}", "\\${x}", "${", "\\\\${x}", "${oc.env:HOME}"])
def test_text_that_looks_like_a_reference_is_read_back_as_it_is(text: str, tmp_path: Path) -> None:
    found = config_from_tree({"data": {"target": text, "drop": [f"a {text}"]}}, "state.json")
    assert (found.data.target, found.data.drop) == (text, [f"a {text}"])
    assert load_config([], base=found) == found
    assert read_back(found, tmp_path) == found
    assert load_config([str(tmp_path / "config.yaml")]) == found


REFERENCES = {
    "data.drop=[a, '${oc.env:NO_SUCH_VARIABLE}']": ("data.drop", "NO_SUCH_VARIABLE"),
    "train.class_weights={a: '${oc.env:NO_SUCH_VARIABLE}'}": ("train.class_weights", "NO_SUCH_VARIABLE"),
    "train.class_weights.a=${nope}": ("train.class_weights", "nope"),
    "model.dropout=[0.1, '${nope}']": ("model.dropout", "nope"),
    "optim.betas=['${optim.betas}', 0.9]": ("optim.betas",),
    "run=${nope}": ("run=${nope}", "run.KEY=value"),
    "train=${oc.env:HOME}": ("train=${oc.env:HOME}", "train.KEY=value"),
    "run=${run.name}": ("run=${run.name}", "run.KEY=value"),
    "run.name=${run.name}": ("run.name",),
    "run.name=${run}": ("run.name",),
    "run.name=${train.epochs": ("run.name",),
    "train.epochs=${run.name}": ("train.epochs",),
    "data.drop=${data.target}": ("data.drop",),
    "data.drop=${data}": ("data.drop",),
    "model.dropout=${data.drop}": ("model.dropout",),
}


@pytest.mark.parametrize("setting", REFERENCES)
def test_a_reference_that_cannot_be_resolved_is_one_line(setting: str) -> None:
    text = mistakes(setting)
    assert text.isprintable()
    assert all(part in text for part in REFERENCES[setting]), text


def test_references_in_lists_and_mappings_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMN", "007")
    config = load_config(["data.drop=['${oc.env:COLUMN}', '${run.name}']", "train.class_weights={a: '${optim.lr}'}"])
    assert config.data.drop == ["007", "run"]
    assert config.train.class_weights == {"a": 1e-3}


def test_plus_adds_to_a_list(tmp_path: Path) -> None:
    default = JobConfig().data.missing_values
    assert load_config(["data.missing_values+=['-', 1e3]"]).data.missing_values == [*default, "-", "1e3"]
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  missing_values+: ['-']\n  drop: [a]\n")
    config = load_config([str(file), "data.drop+=[b]", "data.drop+=['${run.name}']", "data.missing_values+=[x]"])
    assert config.data.drop == ["a", "b", "run"]
    assert config.data.missing_values == [*default, "-", "x"]
    assert load_config(["data.drop+=[b]", "data.drop=[c]"]).data.drop == ["c"]
    assert "must be a list" in mistakes("data.drop+=a")
    assert "only to a list" in mistakes("optim.lr+=[1]")
    assert "unknown key 'data.dorp+'" in mistakes("data.dorp+=[a]")


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("run: {dir: ~/runs}\ndata: {path: ~/t.csv}\n")
    config = load_config(["~/a.yaml"])
    assert (config.run.dir, config.data.path) == (f"{tmp_path}/runs", f"{tmp_path}/t.csv")
    assert load_config(["run.dir=~", "run.name=a~"]).run.dir == str(tmp_path)
    assert mistakes("run.dir=~nobody_has_this_name/x").startswith("run.dir=~nobody_has_this_name/x: there is no such")


def test_an_argument_with_an_equals_sign_is_a_file_where_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "optim.lr=0.1").mkdir()
    for name in ("lr=0.1.yaml", "optim.lr=0.1/config.yaml", "a,b=1.yml"):
        (tmp_path / name).write_text("run: {seed: 3}\n")
        assert load_config([str(tmp_path / name)]).run.seed == 3
        assert not is_setting(str(tmp_path / name))
    assert not is_setting("year=2024/part.parquet")
    assert load_config(["run.dir=runs/x.yaml"]).run.dir == "runs/x.yaml"


ODD_FILES = [
    "a: &a [*a]\n", "a: !!set {b}\n", "? [a]\n: b\n", "a: !!binary eA==\n", "[" * 5000, "a: 1\n---\nb: 2\n", "\0",
    "a: \x1b[31m\n", "run: {name: 'a\n", "<<: 3\n", "run: {<<: [1]}\n", "run:\n  name: [a]\n", "a.b: 1\n",
    "run.name: x\n", "data[0]: 1\n", "run: {name: {a: b}}\n", "&a : *a\n", "run: *a\n", "%YAML 9\n", "3\n", "-\n",
    "optim: {lr: }\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in pairwise("abcdefgh")
    ),
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_FILES)
def test_an_odd_file_is_refused_in_printable_lines(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    said = mistakes(str(tmp_path / "a.yaml"))
    assert all(line.isprintable() for line in said.splitlines())
    assert "a.yaml" in said


LONG = "x" * 300


UNHELD = [
    f"run.name={LONG}", f"run.dir=a/{LONG}", f"data.path={LONG}.csv", "run.name=\udcff", "data.target=\udcff",
    f"{LONG}.yaml", f"a.b={LONG}.yaml", "runtime.timeout_seconds=1e300", 'data.target="\\ud800"',
    f"train.class_weights.a={'1' * 400}", 'data.drop=["\\ud800"]',
]  # fmt: skip


@pytest.mark.parametrize("argument", UNHELD)
def test_what_no_file_system_and_no_number_can_hold_is_refused(argument: str) -> None:
    assert mistakes(argument).isprintable()


def test_a_long_list_is_a_setting() -> None:
    assert is_setting(f"data.drop=[{LONG}]")
    assert load_config([f"data.drop=[{LONG}]"]).data.drop == [LONG]
