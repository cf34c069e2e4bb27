"""A pretrained Transformer with a classification head, whole, frozen, or with low-rank adapters of peft."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config.families import TransformerConfig
from dist_train.data.files.hub import INSTALL
from dist_train.data.tokens import Padding
from dist_train.determinism.dropout import TokenDropout
from dist_train.determinism.keyed_random import seeded
from dist_train.errors import UserError
from dist_train.models.text_base import Pretrained, read_config, read_model, reading, require_positions


class TextNetwork(nn.Module):
    """A Transformer of Hugging Face as a function of padded token ids, (rows, width), and lengths, (rows,) on the CPU.

    Each call is padded to its own longest row, so the shapes of a slice are a function of its rows alone.
    """

    row_wise = True

    def __init__(self, model: nn.Module, padding: Padding) -> None:
        super().__init__()
        self.model = model
        self._padding = padding

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits, (rows, classes)."""
        return self._logits(ids, lengths) if len(ids) else self._no_logits(ids)

    def _logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        width = self._padding.width(lengths)
        mask = torch.arange(width) < lengths.unsqueeze(1)
        output = self.model(input_ids=ids[:, :width].contiguous(), attention_mask=mask.long().to(ids.device))
        logits: Tensor = output.logits
        return logits

    def _no_logits(self, ids: Tensor) -> Tensor:
        """Logits of no rows: those of one token, left out. Other ranks wait for the gradients, which are zeros."""
        length = torch.ones(1, dtype=torch.int64)
        return self._logits(ids.new_full((1, self._padding.width(length)), self._padding.pad_id), length)[:0]


class TextClassifier(nn.Module):
    """`network`, whose state_dict holds what is trained and no more; the rest is the pretrained model's."""

    def __init__(self, network: TextNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits, (rows, classes)."""
        logits: Tensor = self.network(ids, lengths)
        return logits

    @property
    def sharded_root(self) -> nn.Module:
        """The outermost module that ranks share out."""
        return self.network.model

    def state_dict(self, *arguments: Any, **settings: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        """The trained parameters, and buffers that are saved."""
        state = super().state_dict(*arguments, **settings)
        frozen = self._frozen_names()
        return {name: value for name, value in state.items() if name not in frozen}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over what `state_dict` gave. Raises RuntimeError where names or shapes differ."""
        wanted = self.state_dict()
        missing = [name for name in wanted if name not in state]
        strange = [name for name in state if name not in wanted]
        if strict and (missing or strange):
            what = f"missing {missing[0]}" if missing else f"unexpected {strange[0]}"
            raise RuntimeError(f"the trained parameters differ: {what}")
        return super().load_state_dict(state, strict=False, assign=assign)

    def unsaved_state_dict(self) -> dict[str, Tensor]:
        """The parameters of the pretrained model that are not trained, by name."""
        state, frozen = super().state_dict(), self._frozen_names()
        return {name: value for name, value in state.items() if name in frozen}

    def _frozen_names(self) -> set[str]:
        named = self.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if not parameter.requires_grad}


def build_text_classifier(
    base: Pretrained, block: TransformerConfig, class_names: Sequence[str], padding: Padding, seed: int
) -> TextClassifier:
    """The classifier with new weights that are a function of the seed, float32 on the CPU.

    Raises:
        UserError: the pretrained model cannot be read, or a module that the configuration names is not there.
    """
    with seeded("initial weights", seed):
        model = _with_head(base, class_names, padding)
        if block.tuning == "lora":
            model = with_adapters(model, block, "SEQ_CLS")
        elif block.tuning == "head":
            _train_head_alone(model)
    key_dropout_by_token(model, padding.max_tokens)
    return TextClassifier(TextNetwork(model, padding)).train()


def key_dropout_by_token(model: nn.Module, max_tokens: int) -> None:
    """Have each nn.Dropout masked by row and token, in place; `max_tokens` of a row at most."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, TokenDropout(module.p, max_tokens))


def shipped_files(classifier: TextClassifier, tokenizer: Any) -> dict[str, bytes]:
    """What plain transformers and peft load, by file name, of a classifier that has not been prepared for training.

    With adapters `adapter_model.safetensors` and `adapter_config.json`; in `merged/` the whole model, adapters merged
    into its weights, with its tokenizer. The classifier is of no use afterwards.
    """
    model: Any = classifier.network.model
    files: dict[str, bytes] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(model, "merge_and_unload"):
            files |= _saved(model, "")
            model = model.merge_and_unload()
        files |= _saved(model, "merged/") | _saved(tokenizer, "merged/")
    return files


def _saved(thing: Any, prefix: str) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        thing.save_pretrained(folder)
        found = sorted(file for file in Path(folder).iterdir() if file.is_file() and file.name != "README.md")
        return {f"{prefix}{file.name}": file.read_bytes() for file in found}


def _with_head(base: Pretrained, class_names: Sequence[str], padding: Padding) -> Any:
    config = read_config(
        base,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        problem_type="single_label_classification",
    )
    config.pad_token_id = padding.pad_id
    model = read_model(base, "AutoModelForSequenceClassification", config)
    require_positions(model, padding.max_tokens, 0, base.name)
    return model


def with_adapters(model: Any, block: TransformerConfig, task_type: str) -> Any:
    """A model with adapters of peft, whose `task_type` is SEQ_CLS or CAUSAL_LM; what is not trained is frozen.

    Raises:
        UserError: peft is not installed, or a module that the configuration names is not there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError:
        raise UserError(f"{block.section}.tuning=lora needs peft: {INSTALL}") from None
    targets = "all-linear" if block.lora_targets == ["all-linear"] else list(block.lora_targets)
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in block.modules_to_save if name.rpartition(".")[2] not in known]
    if unknown:
        raise UserError(f"{block.section}.modules_to_save: the model has no module {unknown[0]!r}")
    settings = peft.LoraConfig(
        task_type=task_type,
        r=block.lora_rank,
        lora_alpha=block.lora_alpha,
        lora_dropout=block.lora_dropout,
        target_modules=targets,
        modules_to_save=list(block.modules_to_save) or None,
    )
    with reading(f"{block.section}.lora_targets", f"{block.lora_targets}"):
        return peft.get_peft_model(model, settings)


def _train_head_alone(model: Any) -> None:
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefix))
