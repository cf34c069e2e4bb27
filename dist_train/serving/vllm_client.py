"""A classifier of texts on a vLLM server, in the place of one in this process."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from dist_train.errors import TrainingFault, UserError

_TIMEOUT_SECONDS = 600.0


class RemoteClassifier(nn.Module):
    """Logits of token ids, which a server computes. `name` is the model that the server must have.

    Raises:
        UserError: nothing answers at the URL, or the server has another model.
    """

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
