"""Dropout whose mask is a function of (seed, layer, epoch, the row's place in the epoch)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import ModelContext

_LEVELS = 1 << 16
NOTHING_DROPPED = -_LEVELS // 2
"""The lowest threshold."""


class TokenDropout(nn.Dropout):
    """nn.Dropout of tokens: of an input (rows, tokens, width), at most `max_tokens` of a row.

    `convert_dropout` keys its masks by row and token, so that they do not depend on how far a row is padded.
    """

    def __init__(self, p: float, max_tokens: int) -> None:
        super().__init__(p)
        self.max_tokens = max_tokens


class KeyedDropout(nn.Module):
    """Like nn.Dropout, but a row is masked alike on whichever rank, in whichever cut of the batch, after any restart.

    The probability is kept to 1/65536, and the kept values are scaled by exactly its complement. Shapes: (rows, ...).
    With `max_tokens` a token of (rows, tokens, width) is masked alike however many others follow it.
    """

    def __init__(self, p: float, purpose: str, context: ModelContext, max_tokens: int | None = None) -> None:
        super().__init__()
        self.p = p
        self.max_tokens = max_tokens
        num_dropped = min(round(p * _LEVELS), _LEVELS - 1)
        self.threshold = num_dropped + NOTHING_DROPPED
        self.scale = _LEVELS / (_LEVELS - num_dropped)
        self.purpose = purpose
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """The input, masked and scaled in training; itself in evaluation."""
        if not self.training or self.scale == 1:
            return x
        if self.max_tokens is not None and x.ndim == 3:
            bits = self.context.bits16_of_tokens(self.purpose, x, self.max_tokens)
        else:
            bits = self.context.bits16(self.purpose, len(x), x.shape[1:].numel(), x)
        # A number of Python multiplies half precision in float32; in bfloat16 1 / 0.7 itself is 0.08 % too large.
        return torch.where((bits >= self.threshold).view_as(x), x * self.scale, 0.0)


def convert_dropout(model: nn.Module, context: ModelContext) -> nn.Module:
    """Replace every nn.Dropout by a keyed one, in place; state_dict keys do not change.

    A module that stands at several places of the model stays one module, with the random numbers of the first place.
    """
    keyed: dict[nn.Module, KeyedDropout] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Dropout or type(module) is TokenDropout:
            if module not in keyed:
                max_tokens = module.max_tokens if isinstance(module, TokenDropout) else None
                own = KeyedDropout(module.p, f"dropout {name}", context, max_tokens)
                keyed[module] = own.train(module.training)
            if not name:
                return keyed[module]
            model.set_submodule(name, keyed[module])
    return model
