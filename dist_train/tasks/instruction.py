"""Classification of texts by the answers of a causal language model, which is fine-tuned on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dist_train.config import families
from dist_train.config.families import CausalConfig
from dist_train.config.schema import JobConfig
from dist_train.data.texts import Texts
from dist_train.models.causal import build_answering_model
from dist_train.system.console import log
from dist_train.tasks.base import Description, Task
from dist_train.tasks.text import Data, TextTask
from dist_train.tasks.text_reader import Prompt, PromptReader, prompt_of
from dist_train.training.evaluation import probabilities
from dist_train.training.loss import NegativeLogLikelihood, Objective

BEFORE = "this model before training"


class InstructionTask(TextTask):
    """Texts in a prompt, with an answer for each class.

    A logit is the log-likelihood of an answer behind the prompt, the token that ends it among it. The loss is that of
    the answer of the row's class: of its tokens alone, and over the whole vocabulary. Probabilities are the likelihoods
    of the answers, divided by their sum.
    """

    name: ClassVar[str] = "instruction"
    _reader: PromptReader

    @classmethod
    def _reader_of(
        cls, config: JobConfig, tokenizer: Any, fitted: Description | None, class_names: Sequence[str]
    ) -> PromptReader:
        block: CausalConfig = families.block_of(config.model)
        if fitted:
            stored = fitted["prompt"]
            prompt = Prompt(stored["before"], stored["after"], tuple(stored["answers"]))
        else:
            prompt = prompt_of(block, tokenizer, class_names)
        return PromptReader(tokenizer, config.text.max_tokens, prompt, block.section)

    @property
    def answers(self) -> Sequence[Sequence[int]]:
        """Token ids of the answer for each class, the one that ends it among them."""
        return self._reader.answers

    def as_trained(self, description: Description) -> Task:
        """As that of texts. The prompt is the recorded one: a chat template may write the date of the day into it."""
        super().as_trained(description)
        stored, own = description["prompt"], self.description()["prompt"]
        if stored == own or stored["answers"] != own["answers"]:
            return self
        log.warning("the chat template gives another prompt by now: the one that was trained on is kept")
        return type(self).load(self._config, self._collectives, description)

    def model(self, device: torch.device | None = None) -> nn.Module:
        """The model that scores the answers; what is not pretrained is a function of the seed."""
        block: CausalConfig = families.block_of(self._config.model)
        seed = self._config.run.seed
        with self.initial_values():
            model = build_answering_model(self._base, block, self.answers, self._padding, seed)
        return model.to(device or self._collectives.device, self._dtype)

    def description(self) -> Description:
        """What the task of texts describes, and the prompt."""
        prompt = self._reader.prompt
        return super().description() | {"prompt": {**asdict(prompt), "answers": list(prompt.answers)}}

    def inputs(self) -> list[str]:
        """What a text becomes, and what is answered."""
        answers = ", ".join(
            f"{answer!r} ({name})" for answer, name in zip(self._reader.prompt.answers, self.class_names, strict=True)
        )
        return [
            *super().inputs(),
            f"{self._reader.num_around} tokens are the prompt around a text",
            f"answers: {answers}",
        ]

    def _objective_of(self, weights: Tensor | None) -> Objective:
        if self._config.train.loss == "cross_entropy":
            return NegativeLogLikelihood(weights)
        return super()._objective_of(weights)

    def _before_training(self, data: Data) -> Callable[[Texts], dict[str, Tensor]]:  # noqa: ARG002 (another one's)
        rows, passes = self.splits["test"], self._config.evaluation.batch_size
        found = probabilities(self.model(), rows, passes, self, self._collectives)
        return lambda _: {} if found is None else {BEFORE: found}
