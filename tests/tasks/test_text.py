"""The task of texts: what a run leaves, what other libraries load of it, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import polars as pl
import pytest
import torch

from dist_train import load
from dist_train.config.schema import DataConfig, TextConfig
from dist_train.data.texts import read_texts
from dist_train.models.text import TextNetwork
from dist_train.models.text_base import import_transformers
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.tasks.text import TextTask
from tests.cli.in_process import command
from tests.models.tiny_bert import write_texts, write_tiny_bert
from tests.tasks.text_jobs import needs_text_libraries, refused, text_job

pytestmark = needs_text_libraries


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "sent_train.csv", 96)
    write_texts(folder / "sent_valid.csv", 60, seed=1)
    return folder


@pytest.fixture(scope="module")
def run(bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    trained = command("train", *text_job(bert, texts, folder, "train.max_steps=6", "text.baselines=true"))
    assert trained.code == 0, trained.err
    return folder


def test_a_checkpoint_holds_what_is_trained_and_the_base_by_name_and_hash(run: Path, bert: Path) -> None:
    parts = Checkpoints(run / "checkpoints", keep=1).read(6)
    assert parts["model.pth"]
    assert all("lora_" in name or "modules_to_save" in name for name in parts["model.pth"])
    assert parts["task.json"]["base"] == str(bert)
    assert len(parts["task.json"]["base_sha256"]) == 64


def test_the_only_held_out_file_is_test_and_validation_rows_come_from_the_training_file(run: Path) -> None:
    rows = json.loads((run / "split.json").read_text())["rows"]
    assert rows["test"] == 60
    assert rows["train"] + rows["valid"] == 96
    assert rows["valid"] == pytest.approx(96 * 0.15, abs=2)


def test_the_baselines_are_beside_the_model(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["baselines"]) == ["TF-IDF + logistic regression", "frozen encoder + logistic regression"]
    assert summary["baselines"]["TF-IDF + logistic regression"]["accuracy"] > 0.6
    assert all(metrics["rows"] == 60 for metrics in summary["baselines"].values())


def test_tokens_are_kept_and_taken_again(run: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (run / "tokens.npz").is_file()
    monkeypatch.setattr("dist_train.tasks.text_reader.TextReader.tokens", lambda *_: pytest.fail("tokenized again"))
    assert command("train", *text_job(bert, texts, run, "train.max_steps=6")).code == 0


def test_the_shipped_folders_give_the_same_logits_in_plain_transformers_and_peft(
    run: Path, bert: Path, texts: Path
) -> None:
    import peft

    rows = pl.read_csv(texts / "sent_valid.csv")["text"].to_list()
    predictor = load(run, device="cpu")
    member = predictor.members[0]
    transformers = import_transformers()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        inputs = member.task.unlabelled(pl.DataFrame({"text": rows}), "texts").slice(0, len(rows))
        ours = member.model(*inputs)
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model" / "merged").eval()
        base = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
        adapted = peft.PeftModel.from_pretrained(base, run / "model").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model" / "merged")
        encoded = tokenizer(rows, padding=True, truncation=True, max_length=22, return_tensors="pt")
        theirs = [model(**encoded).logits for model in (merged, adapted)]
    assert merged.config.id2label == {0: "bad", 1: "dull", 2: "good"}
    for logits in theirs:
        assert (logits - ours).abs().max() < 1e-6


def test_a_run_is_verified_evaluated_and_predicts(run: Path, texts: Path, tmp_path: Path) -> None:
    verified = command("verify", run)
    assert verified.code == 0, verified.err
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(verified.out)["weights_sha256"] == summary["weights_sha256"]
    shutil.copytree(run / "model", tmp_path / "model")
    evaluated = command("evaluate", tmp_path / "model", "--data", texts / "sent_valid.csv")
    assert json.loads(evaluated.out)["test"]["loss"] == pytest.approx(summary["test"]["loss"], abs=1e-6)
    assert command("predict", run, texts / "sent_valid.csv", tmp_path / "out.csv").code == 0
    assert pl.read_csv(tmp_path / "out.csv").height == 60


def test_a_report_has_no_segments(run: Path) -> None:
    refused(command("report", run, "report.segments=[text]"), "report.segments", "the task text has none")


def test_all_threads_score_a_small_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, threads, together = write_texts(tmp_path / "texts.csv", 900), set(), Barrier(2, timeout=60)
    unlabelled = TextTask.unlabelled

    def noted(*arguments: Any) -> Any:
        together.wait()  # two threads at once
        threads.add(get_ident())
        return unlabelled(*arguments)

    monkeypatch.setattr(TextTask, "unlabelled", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert load(run, device="cpu").predict_proba(texts).shape == (900, 3)
    assert len(threads) == 2


@pytest.mark.parametrize("suffix", [".tsv.gz", ".jsonl.gz", ".ndjson.bz2"])
def test_a_folder_may_have_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    opened = bz2.open if suffix.endswith("bz2") else gzip.open
    for name, words in (("train", ["loss", "profit"]), ("test", ["late", "paid"])):
        rows = [{"text": word, "label": label} for word, label in zip(words, ("bad", "good"), strict=True)]
        lines = [json.dumps(row) for row in rows]
        if suffix.startswith(".tsv"):
            lines = ["text\tlabel", *("\t".join(row.values()) for row in rows)]
        with opened(tmp_path / f"{name}{suffix}", "wt") as file:
            file.write("\n".join(lines) + "\n")
    found = read_texts(DataConfig(path=str(tmp_path), target="label", validation_fraction=0.0), TextConfig(), 0)
    assert found.texts == ["loss", "profit", "late", "paid"]
    assert found.splits.tolist() == [0, 0, 2, 2]


@pytest.mark.slow
def test_a_report_is_made_of_all_rows_and_verified(run: Path) -> None:
    reported = command("report", run)
    assert reported.code == 0, reported.err
    card = json.loads((run / "report.json").read_text())["card"]
    assert card["split"].startswith("by the files of")
    assert command("report", run, "--verify").code == 0


@pytest.mark.parametrize("tuning", ["full", "head"])
def test_other_parts_are_trained(tuning: str, bert: Path, texts: Path, tmp_path: Path) -> None:
    job = text_job(bert, texts, tmp_path / "run", "train.max_steps=2", f"model.transformer.tuning={tuning}")
    assert command("train", *job).code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    alike = summary["trainable_parameters"] == summary["parameters"]
    assert alike if tuning == "full" else summary["trainable_parameters"] == 3 * 17
    assert (tmp_path / "run" / "model" / "merged" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()


class Code:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.file}",)


def test_a_budget_of_tokens_changes_the_passes_and_not_the_steps(
    bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[str, list[int]] = {"whole": [], "within": []}
    logits = TextNetwork._logits

    def noted(self: TextNetwork, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if self.training:
            taken[name].append(len(ids) * self._padding.width(lengths))
        return logits(self, ids, lengths)

    monkeypatch.setattr(TextNetwork, "_logits", noted)
    more = ("train.max_steps=4", "train.precision=float64", "log.every_steps=1", "text.sort_batches=1")
    for name, budget in (("whole", "null"), ("within", "100")):
        trained = command("train", *text_job(bert, texts, tmp_path / name, *more, f"text.tokens_per_pass={budget}"))
        assert trained.code == 0, trained.err
    assert max(taken["within"]) <= 100 < max(taken["whole"])
    lines = [[json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in taken]
    assert len(lines[0]) == len(lines[1])
    for ours, theirs in zip(*lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-9)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_place_of_weights_is_refused_and_its_code_does_not_run(
    name: str, bert: Path, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert, tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    (tmp_path / "bert" / name).write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    result = command("train", *text_job(tmp_path / "bert", texts, tmp_path / "run"))
    refused(result, "bert", "pickled" if name.endswith(".bin") else "cannot be read")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


SETTINGS = {
    "needs model.name=transformer": ["model.name=tabm"],
    "it needs task.name=text": ["task.name=tabular"],
    "data.folds": ["data.folds=3"],
    "text.max_tokens=40": ["text.max_tokens=40"],
    "text.tokens_per_pass: must be at least 66": ["text.tokens_per_pass=65"],
    "the package is not installed": ["model.transformer.pretrained=package:no_such_package"],
    "lora_targets": ["model.transformer.lora_targets=[nothing]"],
    "modules_to_save": ["model.transformer.modules_to_save=[nothing]"],
    "no such folder": ["model.transformer.pretrained=./nowhere"],
}


@pytest.mark.parametrize("words", SETTINGS)
def test_a_setting_that_does_not_fit_is_one_line(words: str, bert: Path, texts: Path, tmp_path: Path) -> None:
    refused(command("train", *text_job(bert, texts, tmp_path / "run"), *SETTINGS[words]), words)
