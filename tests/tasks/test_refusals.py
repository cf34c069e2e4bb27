"""What tasks of texts refuse, of an encoder and of a causal language model: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.in_process import CommandResult, command, contents
from tests.models.tiny_bert import write_texts, write_tiny_bert
from tests.models.tiny_llama import write_tiny_llama
from tests.tasks.text_jobs import instruction_job, needs_text_libraries, refused, text_job

pytestmark = needs_text_libraries


class Kind(NamedTuple):
    """A pretrained model, another one, what writes one, the arguments of a job on one, and its configuration block."""

    base: Path
    other: Path
    write: Callable[..., Path]
    job: Callable[..., list[str]]
    section: str


@pytest.fixture(scope="module", params=["encoder", "causal"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    folder = tmp_path_factory.mktemp("bases")
    bert, llama = write_tiny_bert(folder / "bert"), write_tiny_llama(folder / "llama")
    if request.param == "encoder":
        return Kind(bert, llama, write_tiny_bert, text_job, "model.transformer")
    return Kind(llama, bert, write_tiny_llama, instruction_job, "model.causal_lm")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.csv", 60)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


def train(kind: Kind, texts: Path, run: Path, *more: str, base: Path | None = None) -> CommandResult:
    return command("train", *kind.job(base or kind.base, texts, run, "train.max_steps=2", *more))


FILES = {
    "no column 'text' (text.column)": "words,label\nloss,bad\nprofit,good\n",
    "no column 'label' (data.target)": "text,grade\nloss,bad\nprofit,good\n",
    "data row 2: the text is empty": "text,label\nloss,bad\n  ,good\n",
    "missing in data row 2": "text,label\nloss,bad\nprofit,\n",
    "only one class": "text,label\nloss,bad\nlate,bad\n",
    "the table has no rows": "text,label\n",
    "the file is empty": "",
}


@pytest.mark.parametrize("words", FILES)
def test_a_file_that_does_not_fit(words: str, kind: Kind, run: Path) -> None:
    file = run.parent.parent / "texts.csv"
    file.write_text(FILES[words])
    refused(train(kind, file, run), "texts.csv", words)
    assert not run.parent.exists()


@pytest.mark.parametrize("what", ["more tokens than the model", "no tokenizer", "not JSON", "no such folder"])
def test_a_tokenizer_that_does_not_fit(what: str, kind: Kind, texts: Path, run: Path, tmp_path: Path) -> None:
    place = tmp_path / "tokenizer"
    shutil.copytree(kind.base, place)
    file = place / "tokenizer.json"
    words = "knows"
    if what == "more tokens than the model":
        described = json.loads(file.read_text())
        vocabulary = described["model"]["vocab"]
        vocabulary |= {f"word{i}": len(vocabulary) + i for i in range(50)}
        file.write_text(json.dumps(described))
    elif what == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (place / name).unlink(missing_ok=True)
        words = f"name a folder that has one in {kind.section}.tokenizer"
    elif what == "not JSON":
        file.write_text("{")
        words = "its tokenizer cannot be read"
    else:
        shutil.rmtree(place)
        words = "no such folder"
    refused(train(kind, texts, run, f"{kind.section}.tokenizer={place}"), "tokenizer", words)
    assert not run.parent.exists()


@pytest.mark.parametrize("what", ["model", "tokenizer", "data set"])
def test_a_name_on_the_hub_without_a_network(
    what: str, kind: Kind, texts: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    more = {
        "model": [f"{kind.section}.pretrained=someone/model"],
        "tokenizer": [f"{kind.section}.tokenizer=someone/model"],
        "data set": [f"data.path={tmp_path / 'nowhere'}", "text.hub_dataset=someone/texts"],
    }
    refused(train(kind, texts, run, *more[what]), "someone/", "Hugging Face hub", "network")
    assert not run.parent.exists()


def test_weights_of_another_model(kind: Kind, texts: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(kind.base, tmp_path / "base")
    shutil.copy(kind.other / "model.safetensors", tmp_path / "base")
    refused(train(kind, texts, run, base=tmp_path / "base"), "base: ", "weights", "are missing")
    assert not run.parent.exists()


def test_an_adapter_in_the_place_of_a_model(kind: Kind, texts: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(train(kind, texts, run, base=tmp_path / "adapter"), f"{kind.section}.pretrained", "an adapter and no model")
    assert not run.parent.exists()


def test_an_adapter_is_not_put_on_another_base(kind: Kind, texts: Path, run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(kind.base, base)
    assert train(kind, texts, run, base=base).code == 0
    shutil.rmtree(base)
    kind.write(base, seed=1)
    before = contents(run)
    for name, *arguments in (
        ("predict", run, texts, tmp_path / "out.csv"),
        ("evaluate", run),
        ("verify", run),
        ("train", *kind.job(base, texts, run, "train.max_steps=4")),
    ):
        refused(command(str(name), *arguments), f"{base}: is another model than the one that was trained on")
    assert not (tmp_path / "out.csv").exists()
    assert {file for file, data in contents(run).items() if data != before[file]} <= {"lock"}
