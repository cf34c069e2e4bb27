"""vLLM as a process of its own, in an environment of its own, that serves a trained model of texts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from urllib.error import URLError
from urllib.request import urlopen

from dist_train.config import families
from dist_train.config.families import CausalConfig
from dist_train.errors import TrainingFault, UserError
from dist_train.models.causal import save_as_folder
from dist_train.models.text_base import Pretrained, locate_pretrained
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.trained_model import (
    DESCRIPTION,
    config_of_model,
    is_trained_model,
    read_trained_model,
)

ENVIRONMENT_KEY = "DIST_TRAIN_VLLM"
_DEFAULT_ENVIRONMENT = ".venv-vllm"
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_SECONDS_TO_END = 20.0
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for the rank of its largest adapter."""
_TOKENS_THAT_END = 2
"""The one that ends an answer, and one that vLLM generates behind it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter of peft, served beside the causal language model that it is for."""

    folder: Path
    rank: int
    base: Pretrained


@dataclass(frozen=True)
class ServedModel:
    """A folder of transformers, and what a server needs to know of it. `name` is the SHA-256 of the weights.

    With an `adapter` that is served under the name, and beside it its base, in the place of the folder.
    """

    folder: Path
    name: str
    max_tokens: int
    classifies: bool = True
    adapter: Adapter | None = None


def served_model(folder: Path) -> ServedModel:
    """The merged model of a run folder or of a trained model, or its adapter and its base; every byte verified.

    Raises:
        UserError: it is not one of texts, or the base is another one than was trained on.
    """
    model = folder if is_trained_model(folder) else RunFolder(folder).model
    if not is_trained_model(model):
        raise UserError(f"{folder}: is neither a finished run nor a trained model")
    if not (model / "merged" / "config.json").is_file():
        raise UserError(f"{folder}: vLLM serves models of texts (docs/text.md), and this is another one")
    parts = read_trained_model(model)
    config, name = config_of_model(parts, str(model)), parts[DESCRIPTION]["weights_sha256"]
    merged, block = (model / "merged").resolve(), families.block_of(config.model)
    if not isinstance(block, CausalConfig):
        return ServedModel(merged, name, config.text.max_tokens)
    longest = max(len(answer.encode()) for answer in parts["task.json"]["prompt"]["answers"])  # in tokens at most
    max_tokens = config.text.max_tokens + longest + _TOKENS_THAT_END
    if block.tuning != "lora":
        return ServedModel(merged, name, max_tokens, classifies=False)
    base = locate_pretrained(block.pretrained, f"{block.section}.pretrained")
    if base.sha256() != parts["task.json"]["base_sha256"]:
        raise UserError(f"{base.name}: is another model than the one that was trained on: put that one in its place")
    return ServedModel(merged, name, max_tokens, False, Adapter(model.resolve(), block.lora_rank, base))


def serve_with_vllm(
    model: ServedModel,
    host: str,
    port: int,
    environ: Mapping[str, str],
    timeout_seconds: float,
    when_healthy: Callable[[float], None],
) -> None:
    """Start a server, call `when_healthy` with the seconds that it took, and serve until SIGTERM or SIGINT.

    What vLLM prints goes to stderr.

    Raises:
        UserError: vLLM is not installed, or the port is taken.
        TrainingFault: the server ended by itself, or was not healthy in time.
    """
    python = _python_of_vllm(environ)
    _require_free(host, port)
    began = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(_folder_of(model))
        process = subprocess.Popen(
            [str(python), "-m", "vllm.entrypoints.openai.api_server", *_arguments(model, folder, host, port)],
            env={**_QUIET, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", **environ},
            stdout=2,
            start_new_session=True,
        )
        asked = stack.enter_context(_signals_end(process))
        try:
            if _is_healthy(process, host, port, began + timeout_seconds):
                when_healthy(time.monotonic() - began)
                process.wait()
            elif process.poll() is None:
                raise TrainingFault(f"vLLM was not healthy after {timeout_seconds:g} s")
            if not asked:
                raise TrainingFault(f"vLLM ended with exit code {process.returncode}: its own messages say why")
        finally:
            _end(process)


@contextmanager
def _folder_of(model: ServedModel) -> Iterator[Path]:
    """What vLLM reads weights from; that of a base of GGUF is written, and lasts as long as the block."""
    if model.adapter is None:
        yield model.folder
    elif model.adapter.base.gguf is None:
        yield model.adapter.base.folder.resolve()
    else:
        with TemporaryDirectory(prefix="dist_train_base_") as folder:
            save_as_folder(model.adapter.base, Path(folder))
            yield Path(folder)


def _arguments(model: ServedModel, folder: Path, host: str, port: int) -> list[str]:
    adapter = model.adapter
    arguments = [
        *("--model", str(folder)),
        *("--served-model-name", adapter.base.name if adapter else model.name),
        *("--host", host),
        *("--port", str(port)),
        *("--dtype", "float32"),
        *("--max-model-len", str(model.max_tokens)),
        "--enforce-eager",
    ]
    if model.classifies:
        arguments += ["--runner", "pooling", "--convert", "classify"]
    if adapter:
        rank = next((rank for rank in _RANKS if rank >= adapter.rank), adapter.rank)
        arguments += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{model.name}={adapter.folder}"]
    return arguments


def _python_of_vllm(environ: Mapping[str, str]) -> Path:
    folder = Path(environ.get(ENVIRONMENT_KEY) or _DEFAULT_ENVIRONMENT).absolute()
    python = folder / "bin" / "python"
    if not (python.is_file() and any(folder.glob("lib/python3*/site-packages/vllm"))):
        raise UserError(
            f"{folder}: has no vLLM: `make vllm` installs it into {_DEFAULT_ENVIRONMENT}; {ENVIRONMENT_KEY} names "
            "another environment"
        )
    return python


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {host} --port {port}: {error}: give another port") from None


def _is_healthy(process: subprocess.Popen[bytes], host: str, port: int, deadline: float) -> bool:
    """Whether the server answers before the deadline; False as soon as it has ended."""
    asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(URLError, OSError), urlopen(f"{_address(asked, port)}/health", timeout=5) as answer:
            if answer.status == 200:
                return True
        time.sleep(0.5)
    return False


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _signals_end(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """SIGTERM and SIGINT end the server; the list has those that came."""
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        with suppress(ProcessLookupError):
            process.terminate()

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it has started."""
    with suppress(ProcessLookupError):
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def announcement(model: ServedModel, host: str, port: int, seconds: float) -> str:
    """What a server says of itself when it is healthy, one line of JSON."""
    return json.dumps({"url": _address(host, port), "model": model.name, "seconds_to_start": round(seconds, 1)})
