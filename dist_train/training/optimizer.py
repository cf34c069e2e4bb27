"""AdamW, its parameter groups, its state by parameter name, and the moving average of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def build_adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """Fused AdamW; vectors (biases, normalisation) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


class NamedOptimizerState:
    """The state of an optimizer, by the names of the parameters, whatever groups they are in."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>/<quantity>` -> tensor."""
        return {
            f"{name}/{quantity}": value
            for name, parameter in self._parameters.items()
            for quantity, value in self._optimizer.state[parameter].items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, beside the parameters; KeyError names a parameter without state."""
        known = {key.rpartition("/")[0] for key in state}
        for name in self._parameters:
            if known and name not in known:  # before the first step nothing has a state
                raise KeyError(name)
        for key, value in state.items():
            name, _, quantity = key.rpartition("/")
            parameter = self._parameters[name]
            # The step counter stays where the fused kernel wants it, beside the parameter; other state has its dtype.
            dtype = value.dtype if quantity == "step" else parameter.dtype
            self._optimizer.state[parameter][quantity] = value.to(parameter.device, dtype, copy=True)


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the parameters; buffers follow the model. Call `update_parameters` after a step."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
