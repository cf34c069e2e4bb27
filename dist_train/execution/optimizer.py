"""AdamW on flat parameters, its state by parameter name, and the moving average of weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.execution.flat_parameters import FlatParameters


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, "Decoupled weight decay regularization") on all parameters of a model at once.

    The kernel is that of torch.optim.AdamW(fused=True), called on two tensors: the parameters that are decayed, and
    those named in `undecayed`. torch's optimizer around it takes longer than the kernel does on a
    small network.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        undecayed: Collection[str],
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = [p for name, p in named.items() if name not in undecayed]
        others = [p for name, p in named.items() if name in undecayed]
        self.parameters = FlatParameters([*decayed, *others])
        self._names = {p: name for name, p in named.items()}
        border = self.parameters.offset_of(others[0]) if others else self.parameters.size
        self._moments = self.parameters.zeros(2)
        self._parts = [
            (part, decay, self.parameters.values[part], *self._moments[:, part])
            for part, decay in ((slice(border), weight_decay), (slice(border, None), 0.0))
            if len(self.parameters.values[part])
        ]
        self._betas = betas
        self._eps = eps
        self._steps = torch.zeros((), dtype=torch.float32, device=self._moments.device)

    def step(self, gradients: Tensor, lr: float | Tensor, finite: Tensor | bool) -> None:
        """Update the parameters by flat gradients; where `finite` is false, nothing changes.

        A tensor, (), leaves the decision on the device: nobody waits for it.
        """
        if finite is False:
            return
        self._steps += finite
        skip = (~finite).float() if isinstance(finite, Tensor) else None
        beta1, beta2 = self._betas
        for part, decay, values, mean, square in self._parts:
            torch._fused_adamw_(
                [values], [gradients[part]], [mean], [square], [], [self._steps],
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=self._eps,
                amsgrad=False, maximize=False, grad_scale=None, found_inf=skip,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>/<quantity>` -> tensor; the quantities are exp_avg, exp_avg_sq and step."""
        state: dict[str, Tensor] = {}
        for parameter, name in self._names.items():
            first, second = self.parameters.view(self._moments, parameter)
            state |= {f"{name}/exp_avg": first, f"{name}/exp_avg_sq": second, f"{name}/step": self._steps}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; KeyError names what is missing."""
        for parameter, name in self._names.items():
            first, second = self.parameters.view(self._moments, parameter)
            first.copy_(state[f"{name}/exp_avg"])
            second.copy_(state[f"{name}/exp_avg_sq"])
            self._steps.copy_(state[f"{name}/step"])


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: vectors (biases, normalisation), and what modules declare.

    A module declares its own parameters by their names in an attribute `no_weight_decay`.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    for prefix, module in model.named_modules():
        names |= {f"{prefix}.{name}".lstrip(".") for name in getattr(module, "no_weight_decay", ())}
    return names


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the parameters; buffers follow the model. Call `update_parameters` after a step."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
