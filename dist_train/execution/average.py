"""The moving average of a model's weights, which follows them inside the step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_train.determinism.arithmetic import Arithmetic
from dist_train.execution.flat_parameters import FlatParameters, LayOut, ParameterLayout

_PREFIX = "module."
_COUNT = "n_averaged"


class MovingAverage:
    """Exponential moving average of the trainable parameters of a model; its buffers are copied.

    `module` is the averaged model, a copy of `model` from before it was prepared. `lay_out` lays its trainable
    parameters out as `parameters` are: as views of one tensor an update is one kernel. The first update copies the
    weights; then, with the weight w = 1 - decay, average += w * (weights - average). With `warm_up` the decay of update
    t is min(decay, (1 + t) / (10 + t)), as tf.train.ExponentialMovingAverage has it with `num_updates`: a run that is
    short against 1 / (1 - decay) does not keep its initial weights. On the CPU `arithmetic` does it, torch's unless
    another is given.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        parameters: ParameterLayout,
        decay: float,
        *,
        warm_up: bool = False,
        lay_out: LayOut = FlatParameters,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        self.module = module
        self._decay = decay
        self._warm_up = warm_up
        self._arithmetic = arithmetic or Arithmetic()
        names = {parameter: name for name, parameter in model.named_parameters()}
        averages = lay_out(module.get_parameter(names[p]) for p in parameters.parameters)
        self._pairs = list(zip(*(p.values_between(0, p.size) for p in (averages, parameters)), strict=True))
        buffers = dict(model.named_buffers())
        self._buffers = [(average, buffers[name]) for name, average in module.named_buffers()]
        self._updates = torch.zeros((), dtype=torch.int64, device=parameters.zeros(0).device)

    @property
    def values(self) -> list[Tensor]:
        """The averages of the trainable parameters, in as few tensors as they are in."""
        return [average for average, _ in self._pairs]

    @torch.no_grad()
    def update(self, finite: Tensor | bool) -> None:
        """Follow the weights as they are now; where `finite` is false, nothing changes.

        A tensor, (), leaves the decision on the device, and the host reads nothing there.
        """
        if isinstance(finite, Tensor):
            weight = self._weight_on_device() * finite
            for average, weights in self._pairs:
                average.lerp_(weights, weight.to(average.dtype))
            for average, buffer in self._buffers:
                torch.where(finite, buffer, average, out=average)
        elif finite:
            weight_of_host = self._weight(int(self._updates))
            for average, weights in self._pairs:
                self._arithmetic.follow(average, weights, weight_of_host)
            for average, buffer in self._buffers:
                average.copy_(buffer)
        self._updates += finite

    def _weight(self, updates: int) -> float:
        if updates == 0:
            return 1.0
        return 1 - min(self._decay, (1 + updates) / (10 + updates)) if self._warm_up else 1 - self._decay

    def _weight_on_device(self) -> Tensor:
        """`_weight` of the updates so far, () float64: the same number, by the same operations."""
        updates = self._updates.double()
        decay = ((1 + updates) / (10 + updates)).clamp(max=self._decay) if self._warm_up else self._decay
        return torch.where(updates == 0, torch.ones_like(updates), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The names of torch.optim.swa_utils.AveragedModel: `n_averaged`, updates so far, and `module.<name>`."""
        state = {_COUNT: self._updates}
        return state | {f"{_PREFIX}{name}": value for name, value in self.module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; KeyError or RuntimeError names what is missing."""
        self.module.load_state_dict(
            {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        )
        self._updates.copy_(state[_COUNT])
