"""What a run of texts was trained on is what it goes on with and is verified by: prompts, tokens, pretrained models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import nn

from dist_train.data.tokens import Tokens
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.models.text_base import import_transformers, require_positions
from dist_train.tasks import text
from dist_train.tasks.text import TOKENS
from tests.cli.in_process import command
from tests.models.tiny_bert import MAX_POSITIONS, write_texts, write_tiny_bert
from tests.models.tiny_llama import write_tiny_llama
from tests.ranks import on_ranks
from tests.tasks.text_jobs import instruction_job, needs_text_libraries, refused, text_job

pytestmark = needs_text_libraries


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.csv", 90)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


def weights_of(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["weights_sha256"])


def test_a_prompt_of_another_day_stays_that_which_was_trained_on(texts: Path, tmp_path: Path) -> None:
    llama = write_tiny_llama(tmp_path / "llama")

    def job(name: str, steps: int) -> list[str]:
        more = ("schedule.name=constant", "train.virtual_ranks=1", f"train.max_steps={steps}")
        return instruction_job(llama, texts, tmp_path / "runs" / name, *more)

    for name, steps in (("whole", 8), ("resumed", 4)):
        assert command("train", *job(name, steps)).code == 0
    template = llama / "chat_template.jinja"
    template.write_text(template.read_text().replace("<start>", "<start> today", 1))
    resumed = command("train", *job("resumed", 8))
    assert resumed.code == 0, resumed.err
    assert "gives another prompt by now" in resumed.err
    assert weights_of(tmp_path / "runs" / "resumed") == weights_of(tmp_path / "runs" / "whole")
    assert command("verify", tmp_path / "runs" / "whole").code == 0


def test_tokens_in_the_run_folder_are_those_that_were_written_there(bert: Path, texts: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    job = text_job(bert, texts, run, "train.max_steps=3", "train.virtual_ranks=1")
    assert command("train", *job).code == 0
    weights, packed = weights_of(run), (run / TOKENS).read_bytes()
    for damaged in (packed[:100], packed[:-40], b"", packed.replace(b"ids", b"odd")):
        (run / TOKENS).write_bytes(damaged)
        shutil.rmtree(run / "checkpoints")
        shutil.rmtree(run / "model")
        assert command("train", *job).code == 0
        assert weights_of(run) == weights
    with patch.object(Tokens, "unpack", side_effect=AssertionError("verify makes the tokens again")):
        assert command("verify", run).code == 0


def test_a_table_without_rows_is_scored(bert: Path, texts: Path, tmp_path: Path) -> None:
    run, empty, out = tmp_path / "runs" / "run", tmp_path / "empty.csv", tmp_path / "out.csv"
    assert command("train", *text_job(bert, texts, run, "train.max_steps=1")).code == 0
    empty.write_text("text\n")
    done = command("predict", run, empty, out)
    assert done.code == 0, done.err
    assert out.read_text().splitlines() == ["probability_bad,probability_dull,probability_good,predicted_class"]


def test_texts_without_words_have_no_baseline_of_words(bert: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "letters.csv", tmp_path / "runs" / "run"
    file.write_text("text,label\n" + "".join(f"{'abc'[row % 3]} x,{'abc'[row % 3]}\n" for row in range(60)))
    done = command("train", *text_job(bert, file, run, "train.max_steps=1", "text.baselines=true"))
    assert done.code == 0, done.err
    assert "TF-IDF + logistic regression is left out: empty vocabulary" in done.err
    assert list(json.loads((run / "summary.json").read_text())["baselines"]) == ["frozen encoder + logistic regression"]


def test_positions_that_begin_behind_those_of_padding_are_fewer(bert: Path, texts: Path, tmp_path: Path) -> None:
    transformers = import_transformers()
    roberta = tmp_path / "roberta"
    shutil.copytree(bert, roberta)
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=MAX_POSITIONS, pad_token_id=0,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(roberta)
    run = tmp_path / "runs" / "run"
    more = ("train.max_steps=1", f"text.max_tokens={MAX_POSITIONS}")
    refused(command("train", *text_job(roberta, texts, run, *more)), f"takes {MAX_POSITIONS - 1} tokens at most")


def test_answers_take_positions_behind_the_prompt() -> None:
    model = nn.ModuleDict({"wpe": nn.Embedding(16, 4)})
    require_positions(model, 14, 2, "a model")
    with pytest.raises(UserError, match=r"text.max_tokens=15: a model takes 14 tokens at most"):
        require_positions(model, 15, 2, "a model")


def same_on_two_hosts(collectives: Collectives) -> list[str]:
    """What is said of pretrained models that differ, and that do not."""
    said = []
    with patch.object(text, "host_name", lambda: f"host{collectives.rank}"):
        for found in ("same", f"of rank {collectives.rank}"):
            try:
                text._same_on_all_hosts("base", lambda found=found: {"base_sha256": found}, collectives)
                said.append("")
            except UserError as error:
                said.append(str(error))
    return said


def test_hosts_have_the_same_pretrained_model() -> None:
    for said in on_ranks(2, same_on_two_hosts):
        assert said == ["", "base: host host1 has another model or tokenizer than host host0"]
