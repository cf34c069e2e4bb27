"""A model of texts on a vLLM server, in the place of one in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from dist_train.errors import TrainingFault, UserError
from dist_train.tasks.base import HasAnswers, Task

_TIMEOUT_SECONDS = 600.0


def remote_model(url: str, name: str, task: Task) -> nn.Module:
    """The model of a task on a server, which must have it by that name. Raises as `RemoteClassifier`."""
    if isinstance(task, HasAnswers):
        return RemoteAnswers(url, name, task.answers)
    return RemoteClassifier(url, name, len(task.class_names))


class RemoteClassifier(nn.Module):
    """Logits of token ids, which a server computes. `name` is the model that the server must have.

    Raises:
        UserError: nothing answers at the URL, or the server has another model.
    """

    rows_at_once = 512  # of a request: the server makes batches of them itself

    def __init__(self, url: str, name: str, num_classes: int) -> None:
        super().__init__()
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError(f"--url {url}: must be the address of a server, as http://127.0.0.1:8000")
        self._url = url.rstrip("/")
        self._name = name
        self._num_classes = num_classes
        served = [model.get("id") for model in self._ask("/v1/models").get("data", [])]
        if name not in served:
            raise UserError(f"--url {url}: the server has another model: SHA-256 {', '.join(map(str, served))[:80]}")

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits, (rows, classes) float32, of padded token ids, (rows, width), and lengths, (rows,)."""
        if not len(ids):
            return torch.zeros((0, self._num_classes))
        rows = [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        return self._logits(rows)

    def _logits(self, rows: list[list[int]]) -> Tensor:
        answer = self._ask("/classify", {"model": self._name, "input": rows, "use_activation": False})
        logits = torch.tensor([each["probs"] for each in sorted(answer["data"], key=lambda each: each["index"])])
        if logits.shape != (len(rows), self._num_classes):
            raise TrainingFault(f"{self._url}: the server answered {tuple(logits.shape)} logits for {len(rows)} texts")
        return logits

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if content is None else json.dumps(content).encode()
        request = Request(self._url + path, data, {"content-type": "application/json"})  # http or https
        try:
            with urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
        except HTTPError as error:
            said = error.read(300).decode(errors="replace").strip()
            raise UserError(f"--url {self._url}: the server refuses {path}: {error.code} {said}") from None
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"--url {self._url}: nothing answers ({reason}): dist-train serve RUN --engine vllm starts a server"
            ) from None
        return found


class RemoteAnswers(RemoteClassifier):
    """Log-likelihoods of answers behind prompts of token ids, which a server computes.

    Raises:
        UserError: as RemoteClassifier.
    """

    def __init__(self, url: str, name: str, answers: Sequence[Sequence[int]]) -> None:
        super().__init__(url, name, len(answers))
        self._answers = [list(answer) for answer in answers]

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """A request for each token that follows a prompt and what an answer begins with, the same of several at once.

        Not `prompt_logprobs`: with an adapter they end vLLM 0.32 for CPUs.
        """
        edges = {(tuple(answer[:depth]), token): 0 for answer in self._answers for depth, token in enumerate(answer)}
        likely = {edge: self._of_token([row + list(edge[0]) for row in rows], edge[1]) for edge in edges}
        found = [
            torch.stack([likely[tuple(answer[:depth]), token] for depth, token in enumerate(answer)]).sum(0)
            for answer in self._answers
        ]
        return torch.stack(found, 1)

    def _of_token(self, rows: list[list[int]], token: int) -> Tensor:
        """Log-likelihood of a token behind each of some rows, (rows,)."""
        content = {
            "model": self._name,
            "prompt": rows,
            "max_tokens": 1,
            "temperature": 0.0,
            "allowed_token_ids": [token],
            "logprobs": 1,
        }
        choices = sorted(self._ask("/v1/completions", content)["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(rows):
            raise TrainingFault(f"{self._url}: the server answered {len(choices)} likelihoods for {len(rows)} prompts")
        return torch.tensor([float(choice["logprobs"]["token_logprobs"][0]) for choice in choices])
