"""Texts -> token ids, as they are or inside a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dist_train.config.families import CausalConfig
from dist_train.data.tokens import Tokens
from dist_train.errors import UserError
from dist_train.models.text_base import reading

_TEXT, _ANSWERS = "{text}", "{answers}"
_PLACE = "\uf8ff"  # of the text in a chat template, where a brace could be one of the template's own
_TOKENIZING = Lock()
"""A tokenizer keeps its settings as state, which two threads that score must not set at once."""


class TextReader:
    """Token ids of texts with those that the tokenizer adds; a text keeps its first ones, at most `max_tokens`."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    @property
    def described(self) -> str:
        """What the tokens of a text depend on, beside the tokenizer."""
        return str(self._max_tokens)

    def tokens(self, texts: list[str]) -> Tokens:
        """The tokens of texts, in their order."""
        with _TOKENIZING:
            return _packed(*self._encoded(texts, self._max_tokens, plain=False))

    def _encoded(self, texts: list[str], max_tokens: int, *, plain: bool) -> tuple[list[list[int]], int]:
        """Token ids of each text, and how many texts were cut; `plain`: no special token is among them."""
        if not texts:  # which transformers does not take
            return [], 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoded = self._tokenizer(
                texts,
                add_special_tokens=not plain,
                split_special_tokens=plain,
                truncation=True,
                max_length=max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        return encoded["input_ids"], sum(bool(each.overflowing) for each in encoded.encodings)


@dataclass(frozen=True)
class Prompt:
    """What stands before and after a text, and the answer for each class; special tokens are written out."""

    before: str
    after: str
    answers: tuple[str, ...]


class PromptReader(TextReader):
    """Token ids of a prompt around each text; the text is cut so that the prompt has at most `max_tokens`.

    What looks like a special token in a text is read as plain characters: a text cannot end its part of the prompt.

    Raises:
        UserError: `max_tokens` leave too few for a text, two answers have the same tokens, or the tokenizer has no
            token that ends an answer.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, prompt: Prompt, section: str) -> None:
        super().__init__(tokenizer, max_tokens)
        self.prompt = prompt
        self._before, self._after = (self._ids(part) for part in (prompt.before, prompt.after))
        if tokenizer.eos_token_id is None:
            raise UserError(f"{section}.tokenizer: has no token that ends an answer (eos_token)")
        self.answers = [[*self._ids(answer), int(tokenizer.eos_token_id)] for answer in prompt.answers]
        for number, answer in enumerate(self.answers):
            if len(answer) == 1 or answer in self.answers[:number]:
                what = "has no tokens" if len(answer) == 1 else "has the same tokens as that of another class"
                raise UserError(f"{section}.answers: the answer {prompt.answers[number]!r} {what}")
        if self.num_around + 1 > max_tokens:
            raise UserError(
                f"text.max_tokens={max_tokens}: the prompt alone has {self.num_around} tokens: it must be more"
            )

    @property
    def num_around(self) -> int:
        """Tokens of a prompt beside its text."""
        return len(self._before) + len(self._after)

    @property
    def described(self) -> str:
        """What the tokens of a text depend on, beside the tokenizer."""
        return repr((self._max_tokens, self._before, self._after))

    def tokens(self, texts: list[str]) -> Tokens:
        """The tokens of prompts, in the order of their texts."""
        with _TOKENIZING:
            encoded, cut = self._encoded(texts, self._max_tokens - self.num_around, plain=True)
        return _packed([[*self._before, *ids, *self._after] for ids in encoded], cut)

    def _ids(self, text: str) -> list[int]:
        with _TOKENIZING:
            return list(self._tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])


def prompt_of(block: CausalConfig, tokenizer: Any, class_names: Sequence[str]) -> Prompt:
    """The prompt of a configuration, by the chat template of the tokenizer if it has one.

    Raises:
        UserError: an answer is for no class, or the template does not take the messages.
    """
    for name in block.answers:
        if name not in class_names:
            raise UserError(f"{block.section}.answers: there is no class {name!r}; there is {', '.join(class_names)}")
    answers = tuple(block.answers.get(name, name) for name in class_names)
    message = block.instruction.replace(_TEXT, _PLACE).replace(_ANSWERS, ", ".join(answers))
    if tokenizer.chat_template is None:
        written = f"{block.system}\n\n{message}" if block.system else message
    else:
        system = [] if block.system is None else [{"role": "system", "content": block.system}]
        with reading(f"{block.section}.tokenizer", "its chat template"):
            written = tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
            )
    before, *after = written.split(_PLACE)
    if len(after) != 1:
        raise UserError(f"{block.section}.tokenizer: its chat template has the message {len(after)} times")
    return Prompt(before, after[0], answers)


def _packed(encoded: list[list[int]], cut: int) -> Tokens:
    ids = [torch.tensor(each, dtype=torch.int32) for each in encoded]
    ends = torch.tensor([0, *(len(each) for each in ids)], dtype=torch.int64).cumsum(0)
    joined: Tensor = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32)
    return Tokens(joined, ends, cut)
