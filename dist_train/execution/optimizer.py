"""AdamW on flat parameters, and its state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from dist_train.determinism.arithmetic import AdamWSettings, Arithmetic
from dist_train.execution.flat_parameters import FlatParameters, LayOut


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, "Decoupled weight decay regularization") on all parameters of a model at once.

    The kernel of `arithmetic`, torch's unless another is given, is called on one tensor for each group: the parameters
    that are decayed, those named in `undecayed`, and both again for each multiplier of the learning rate in
    `lr_multipliers` (name -> multiplier; 1 where a name is not there). torch's optimizer around its kernel takes longer
    than the kernel does on a small network. `lay_out` says where the parameters are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        undecayed: Collection[str],
        lr_multipliers: Mapping[str, float] | None = None,
        lay_out: LayOut = FlatParameters,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, weight_decay): [], (1.0, 0.0): []}
        for name, parameter in named.items():
            group = (lr_multipliers or {}).get(name, 1.0), 0.0 if name in undecayed else weight_decay
            groups.setdefault(group, []).append(parameter)
        groups = {group: members for group, members in groups.items() if members}
        self.parameters = lay_out([p for members in groups.values() for p in members])
        self._names = {p: name for name, p in named.items()}
        starts = [self.parameters.offset_of(members[0]) for members in groups.values()]
        ends = [*starts[1:], self.parameters.size]
        self.moments = self.parameters.zeros(2)
        self.groups = [(start, end, *group) for group, start, end in zip(groups, starts, ends, strict=True)]
        """Where parameters of a group begin, end, the multiplier of their learning rate, their weight decay."""
        self._parts = [self._part(start, end) for start, end, _, _ in self.groups]
        self.betas = betas
        self.eps = eps
        self._arithmetic = arithmetic or Arithmetic()
        self.steps = torch.zeros((), dtype=torch.float32, device=self.moments.device)

    def step(self, gradients: Tensor, lr: float | Tensor, finite: Tensor | bool) -> None:
        """Update the parameters by flat gradients; where `finite` is false, nothing changes.

        A tensor, (), leaves the decision on the device: nobody waits for it.
        """
        if finite is False:
            return
        self.steps += finite
        skip = (~finite).float() if isinstance(finite, Tensor) else None
        for (start, end, multiplier, decay), (values, means, squares) in zip(self.groups, self._parts, strict=True):
            rate = lr if multiplier == 1.0 else lr * multiplier
            if not values:
                continue
            own = self.parameters.cut(gradients, start, end)
            settings = AdamWSettings(rate, self.betas, self.eps, decay)
            self._arithmetic.adamw(values, own, means, squares, self.steps, settings, skip)

    def _part(self, start: int, end: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Values, first and second moments of a group."""
        first, second = (self.parameters.cut(moment, start, end) for moment in self.moments)
        return self.parameters.values_between(start, end), first, second

    @property
    def steps_taken(self) -> int:
        """Updates so far."""
        return int(self.steps)

    def count_steps(self, count: int) -> None:
        """Count updates that were made elsewhere."""
        self.steps += count

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>/<quantity>` -> tensor; the quantities are exp_avg, exp_avg_sq and step.

        Called by all ranks; rank 0 has whole tensors.
        """
        state: dict[str, Tensor] = {}
        for parameter, name in self._names.items():
            first, second = map(self.parameters.whole, self.parameters.view(self.moments, parameter))
            state |= {f"{name}/exp_avg": first, f"{name}/exp_avg_sq": second, f"{name}/step": self.steps}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; KeyError names what is missing."""
        for parameter, name in self._names.items():
            first, second = self.parameters.view(self.moments, parameter)
            first.copy_(self.parameters.own(state[f"{name}/exp_avg"]))
            second.copy_(self.parameters.own(state[f"{name}/exp_avg_sq"]))
            self.steps.copy_(state[f"{name}/step"])


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: vectors (biases, normalisation), and what modules declare.

    A module declares its own parameters by their names in an attribute `no_weight_decay`.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    for prefix, module in model.named_modules():
        names |= {f"{prefix}.{name}".lstrip(".") for name in getattr(module, "no_weight_decay", ())}
    return names


def lr_multipliers(model: nn.Module) -> dict[str, float]:
    """Multipliers of the learning rate by name of the parameter, as modules declare them.

    A module declares them in an attribute `lr_multipliers`: name of a parameter of its own -> number above 0.

    Raises:
        ValueError: there is no such parameter, or the number is not above 0.
    """
    known = {name for name, _ in model.named_parameters()}
    found: dict[str, float] = {}
    for prefix, module in model.named_modules():
        for own, multiplier in getattr(module, "lr_multipliers", {}).items():
            name = f"{prefix}.{own}".lstrip(".")
            if name not in known or not (multiplier > 0 and math.isfinite(multiplier)):
                raise ValueError(f"{type(module).__name__}.lr_multipliers: {own!r}: {multiplier} fits no parameter")
            found[name] = float(multiplier)
    return found
