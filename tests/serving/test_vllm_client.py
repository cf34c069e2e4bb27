"""predict --url against a server that answers as vLLM does, and what serve refuses."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from dist_train import load
from dist_train.models.text_base import import_transformers
from tests.cli.in_process import command
from tests.models.tiny_bert import write_texts, write_tiny_bert
from tests.models.tiny_llama import write_tiny_llama
from tests.ranks import free_port
from tests.resume.jobs import tiny_job, write_table
from tests.tasks.text_jobs import instruction_job, needs_text_libraries, refused, text_job

pytestmark = needs_text_libraries


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    bert, texts = write_tiny_bert(folder / "bert"), write_texts(folder / "texts.csv", 90)
    trained = command("train", *text_job(bert, texts, folder / "run", "train.max_steps=4"))
    assert trained.code == 0, trained.err
    return folder / "run"


class Server(BaseHTTPRequestHandler):
    """The two addresses of vLLM that are used; logits are those of the run's own classifier."""

    model: Any = None
    name = ""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": self.name}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert (self.path, asked["model"], asked["use_activation"]) == ("/classify", self.name, False)
        lengths = torch.tensor([len(row) for row in asked["input"]])
        ids = torch.zeros((len(lengths), 32), dtype=torch.int64)  # the model takes as much of it as its longest text
        for number, row in enumerate(asked["input"]):
            ids[number, : len(row)] = torch.tensor(row)
        with torch.no_grad():
            logits = self.model(ids, lengths).tolist()
        self._answer({"data": [{"index": i, "probs": logits[i]} for i in reversed(range(len(logits)))]})

    def _answer(self, content: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


class LanguageServer(Server):
    """The same of a causal language model, whose model is that of transformers."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert (self.path, asked["model"], asked["max_tokens"]) == ("/v1/completions", self.name, 1)
        (token,) = asked["allowed_token_ids"]
        choices = []
        for index, row in enumerate(asked["prompt"]):
            with torch.no_grad():
                last = self.model(input_ids=torch.tensor([row])).logits[0, -1].log_softmax(0)
            choices.append({"index": index, "logprobs": {"token_logprobs": [float(last[token])]}})
        self._answer({"choices": choices[::-1]})


@contextmanager
def _serving(run: Path, kind: type[Server], model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(kind, "model", model)
    monkeypatch.setattr(kind, "name", json.loads((run / "summary.json").read_text())["weights_sha256"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def url(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with _serving(run, Server, load(run, device="cpu").members[0].model, monkeypatch) as address:
        yield address


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answering")
    llama, texts = write_tiny_llama(folder / "llama"), write_texts(folder / "texts.csv", 60)
    more = ("train.max_steps=4", "model.causal_lm.answers={dull: bad really}", "model.causal_lm.lora_rank=5")
    trained = command("train", *instruction_job(llama, texts, folder / "run", *more))
    assert trained.code == 0, trained.err
    return folder / "run"


def test_a_server_scores_the_answers_of_a_causal_model(
    answering: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = answering.parent / "texts.csv"
    assert command("predict", answering, texts, tmp_path / "here.csv").code == 0
    merged = import_transformers().AutoModelForCausalLM.from_pretrained(answering / "model" / "merged").eval()
    with _serving(answering, LanguageServer, merged, monkeypatch) as url:
        there = command("predict", answering, texts, tmp_path / "there.csv", "--url", url)
    assert there.code == 0, there.err
    ours, theirs = (pl.read_csv(tmp_path / f"{name}.csv").drop("predicted_class") for name in ("here", "there"))
    assert (ours.to_torch() - theirs.to_torch()).abs().max() < 1e-5


def test_an_adapter_is_served_beside_its_base(answering: Path, tmp_path: Path) -> None:
    (tmp_path / "lib" / "python3.11" / "site-packages" / "vllm").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n')
    python.chmod(0o755)
    served = command("serve", answering, "--engine", "vllm", "--port", free_port(), DIST_TRAIN_VLLM=str(tmp_path))
    assert "vLLM ended with exit code 0" in served.err
    said = (tmp_path / "said").read_text()
    name = json.loads((answering / "summary.json").read_text())["weights_sha256"]
    base = answering.parent / "llama"
    assert f"--model {base} --served-model-name {base} " in said
    assert f"--enable-lora --max-lora-rank 8 --lora-modules {name}={answering / 'model'}" in said
    assert "classify" not in said


def test_a_server_gives_the_probabilities_of_this_process(run: Path, url: str, tmp_path: Path) -> None:
    texts = run.parent / "texts.csv"
    assert command("predict", run, texts, tmp_path / "here.csv").code == 0
    there = command("predict", run, texts, tmp_path / "there.csv", "--url", url)
    assert there.code == 0, there.err
    ours, theirs = (pl.read_csv(tmp_path / f"{name}.csv").drop("predicted_class") for name in ("here", "there"))
    assert (ours.to_torch() - theirs.to_torch()).abs().max() < 1e-6


def test_a_server_with_another_model_is_refused(
    run: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "name", "f" * 64)
    refused(
        command("predict", run, run.parent / "texts.csv", tmp_path / "out.csv", "--url", url), "--url", "another model"
    )
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://127.0.0.1", "nothing"])
def test_an_address_without_a_server_is_one_line(url: str, run: Path, tmp_path: Path) -> None:
    refused(command("predict", run, run.parent / "texts.csv", tmp_path / "out.csv", "--url", url), f"--url {url}")


def test_without_vllm_the_command_that_installs_it_is_named(run: Path, tmp_path: Path) -> None:
    refused(command("serve", run, "--engine", "vllm", DIST_TRAIN_VLLM=str(tmp_path)), "make vllm")


def test_a_port_that_is_taken_is_one_line(run: Path, tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm"
    packages.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(command("serve", run, "--engine", "vllm", "--port", port, DIST_TRAIN_VLLM=str(tmp_path)), f"{port}")


def test_a_run_on_a_table_is_not_served_by_vllm(tmp_path: Path) -> None:
    job = tiny_job(write_table(tmp_path / "clients.csv"), tmp_path / "run", "train.max_steps=2")
    assert command("train", *job).code == 0
    refused(command("serve", tmp_path / "run", "--engine", "vllm"), "serves models of texts")
