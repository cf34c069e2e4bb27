"""A pretrained causal language model that scores given answers to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config.families import CausalConfig
from dist_train.data.tokens import Padding
from dist_train.determinism.keyed_random import seeded
from dist_train.errors import UserError
from dist_train.models.text import TextClassifier, TextNetwork, key_dropout_by_token, with_adapters
from dist_train.models.text_base import Pretrained, load_tokenizer, read_config, read_model, require_positions

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AnswerTree:
    """Answers whose tokens stand side by side behind a prompt; what several begin with stands there once.

    Place 0 is the last token of the prompt, place i + 1 that of `tokens[i]`, behind place `parents[i]`. An edge is a
    place and the token that is predicted there; `edges` are all of them, `paths` those of each answer.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> AnswerTree:
        """The tree of answers that are token ids, the token that ends an answer among them."""
        places: dict[tuple[int, ...], int] = {(): 0}
        edges: dict[tuple[int, int], int] = {}
        paths = []
        for answer in answers:
            path = []
            for depth, token in enumerate(answer):
                place = places.setdefault(tuple(answer[:depth]), len(places))
                path.append(edges.setdefault((place, token), len(edges)))
            paths.append(tuple(path))
        inner = [prefix for prefix in places if prefix]
        parents = tuple(places[prefix[:-1]] for prefix in inner)
        return cls(tuple(prefix[-1] for prefix in inner), parents, tuple(edges), tuple(paths))

    def depths(self) -> list[int]:
        """How far each place is behind the last token of the prompt, (places,)."""
        found = [0]
        for parent in self.parents:
            found.append(found[parent] + 1)
        return found

    def sees(self) -> Tensor:
        """Whether a place, the row, is at or behind another, the column: (places, places) bool."""
        found = torch.eye(len(self.tokens) + 1, dtype=torch.bool)
        for place, parent in enumerate(self.parents, 1):
            found[place] |= found[parent]
        return found


class AnswerNetwork(TextNetwork):
    """Log-likelihood of each answer, in nats, as a function of padded prompts and their lengths.

    A row is computed once for all answers: the last token of the prompt, the tokens of the tree, then the prompt
    without its last token. A mask has each token see what is before it in its own answer; so the place of a token in a
    row does not depend on how far the row is padded.
    """

    at: Tensor
    predicted: Tensor
    paths: Tensor
    left: Tensor
    tokens: Tensor
    depths: Tensor
    sees: Tensor

    def __init__(self, model: Any, tree: AnswerTree, padding: Padding) -> None:
        super().__init__(model, padding)
        at, predicted = zip(*tree.edges, strict=True)
        paths = torch.zeros((len(tree.edges), len(tree.paths)))
        left = torch.zeros((len(tree.tokens) + 1, len(tree.paths)))
        for answer, path in enumerate(tree.paths):
            paths[list(path), answer] = 1.0
            left[[at[edge] for edge in path], answer] = 1.0
        for name, value in {
            "at": torch.tensor(at),
            "predicted": torch.tensor(predicted),
            "paths": paths,
            "left": left,
            "tokens": torch.tensor(tree.tokens, dtype=torch.int64),
            "depths": torch.tensor(tree.depths()),
            "sees": tree.sees(),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def _logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        width, last = self._padding.width(lengths), (lengths - 1).to(ids.device)
        rows, places = len(ids), len(self.depths)
        inner = torch.arange(width - 1, device=ids.device)
        inside = inner < last.unsqueeze(1)
        tokens = [ids.gather(1, last.unsqueeze(1)), self.tokens.expand(rows, -1), ids[:, : width - 1]]
        positions = [last.unsqueeze(1) + self.depths, inner.expand(rows, -1)]
        of_places = torch.cat([self.sees.expand(rows, -1, -1), inside.unsqueeze(1).expand(-1, places, -1)], 2)
        causal = inner <= inner.unsqueeze(1)
        of_prompt = torch.cat([causal.new_zeros((len(inner), places)), causal], 1).expand(rows, -1, -1)
        seen = torch.cat([of_places, of_prompt], 1).unsqueeze(1)
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill_(~seen, torch.finfo(dtype).min)
        output = self.model(
            input_ids=torch.cat(tokens, 1),
            attention_mask=mask,
            position_ids=torch.cat(positions, 1),
            use_cache=False,
            logits_to_keep=torch.arange(places, device=ids.device),
        )
        return self._likelihoods(output.logits)

    def _likelihoods(self, logits: Tensor) -> Tensor:
        """Of logits of the tree's places, (rows, places, vocabulary): (rows, answers), in float32 or float64."""
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        edges = logits[:, self.at, self.predicted]
        return edges @ self.paths.to(edges.dtype) - logits.logsumexp(2) @ self.left.to(edges.dtype)


def build_answering_model(
    base: Pretrained, block: CausalConfig, answers: Sequence[Sequence[int]], padding: Padding, seed: int
) -> TextClassifier:
    """The model that scores answers, token ids with the one that ends an answer; float32 on the CPU.

    New weights are a function of the seed.

    Raises:
        UserError: the pretrained model cannot be read, cannot be asked for several answers at once, or a module that
            the configuration names is not there.
    """
    tree = AnswerTree.of(answers)
    with seeded("initial weights", seed):
        model = read_model(base, "AutoModelForCausalLM", read_config(base))
        require_positions(model, padding.max_tokens, max(tree.depths()), base.name)
        _require_masks(model, tree, padding, base.name, answers)
        if block.tuning == "lora":
            model = with_adapters(model, block, "CAUSAL_LM")
    key_dropout_by_token(model, padding.max_tokens + len(tree.tokens))
    return TextClassifier(AnswerNetwork(model, tree, padding)).train()


def save_as_folder(base: Pretrained, folder: Path) -> None:
    """Write a causal language model and its tokenizer as transformers does, in float32.

    Raises:
        UserError: transformers cannot read them.
    """
    read_model(base, "AutoModelForCausalLM", read_config(base)).save_pretrained(folder)
    load_tokenizer(base, "model.causal_lm.tokenizer").save_pretrained(folder)


@torch.no_grad()
def _require_masks(model: Any, tree: AnswerTree, padding: Padding, name: str, answers: Sequence[Sequence[int]]) -> None:
    """UserError where answers that are scored together do not score as each does by itself."""
    model.eval()
    prompt = list(dict.fromkeys(token for answer in answers for token in answer))[:3]
    try:
        lengths = torch.tensor([len(prompt)])
        ids = torch.tensor([prompt + [padding.pad_id] * (padding.width(lengths) - len(prompt))])
        together = AnswerNetwork(model, tree, padding)(ids, lengths)[0]
        alone = torch.stack([_likelihood(model, prompt, answer) for answer in answers])
        fits = bool(((together - alone).abs() <= _TOLERANCE * (1 + alone.abs())).all())
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{name}: a {type(model).__name__} of transformers takes no mask and position of each token, which answers "
            "are scored by: use another architecture, as Llama's"
        )


def _likelihood(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]])
    found: Tensor = model(input_ids=ids[:, :-1]).logits[0].log_softmax(1)
    return found[len(prompt) - 1 :].gather(1, ids[0, len(prompt) :, None]).sum()
