"""A multilayer perceptron with what of RealMLP is the network's (Holzmüller, Grinsztajn and Steinwart 2024, "Better by
default: strong pre-tuned MLPs and boosted trees on tabular data").

Taken from it: a learned factor for each input, the neural tangent parametrisation, parametric activations, and the
learning rates of these relative to those of the weights. Its initial weights and biases that are fitted to the first
batch are not: here they are normal numbers, as those of its simplified version, and the output layer is no exception.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.config.families import RealMLPConfig
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.models.embeddings import TableFeatures
from dist_train.models.registry import register_model

_ACTIVATIONS = {"selu": functional.selu, "mish": functional.mish}


class InputScale(nn.Module):
    """A learned factor for each input, 1 at first: (rows, features) -> (rows, features)."""

    row_wise = True
    lr_multipliers: ClassVar = {"factors": 6.0}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled inputs."""
        return x * self.factors


class TangentLinear(nn.Module):
    """Linear layer in the neural tangent parametrisation (Jacot, Gabriel and Hongler 2018): x W^T / sqrt(in) + b.

    Shapes: (rows, in) -> (rows, out). W, (out, in), and b, (out,), are standard normal at first.
    """

    row_wise = True
    lr_multipliers: ClassVar = {"bias": 0.1}

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(num_outputs, num_inputs)))
        self.bias = nn.Parameter(nn.init.normal_(torch.empty(num_outputs)))
        self.factor = num_inputs**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the layer."""
        return functional.linear(x, self.weight * self.factor, self.bias)


class ParametricActivation(nn.Module):
    """x + a (f(x) - x), where each unit has its own learned share a, 1 at first: (rows, units) -> (rows, units)."""

    row_wise = True
    lr_multipliers: ClassVar = {"share": 0.1}

    def __init__(self, width: int, name: str) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.ones(width))
        self.function = _ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        """Activated units."""
        return x + self.share * (self.function(x) - x)


class RealMLP(nn.Module):
    """Scaled inputs, and blocks of a linear layer, a parametric activation and dropout.

    Shapes: numeric (rows, num_numeric), flags (rows, num_flags), codes (rows, num_categorical) -> logits
    (rows, classes).
    """

    row_wise = True

    def __init__(self, spec: FeatureSpec, config: RealMLPConfig) -> None:
        super().__init__()
        self.features = TableFeatures(spec, config)
        layers: list[nn.Module] = [InputScale(self.features.width)]
        width = self.features.width
        for _ in range(config.blocks):
            layers.append(TangentLinear(width, config.width))
            layers.append(ParametricActivation(config.width, config.activation))
            layers.append(nn.Dropout(config.dropout))
            width = config.width
        self.layers = nn.Sequential(*layers, TangentLinear(width, spec.num_classes))

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Logits of the rows."""
        logits: Tensor = self.layers(self.features(numeric, flags, codes))
        return logits


@register_model("realmlp", RealMLPConfig)
def build(spec: FeatureSpec, config: RealMLPConfig) -> nn.Module:
    """RealMLP over the columns of the table."""
    return RealMLP(spec, config)
