"""ResNet for tables (Gorishniy, Rubachev, Khrulkov and Babenko 2021, "Revisiting deep learning models for tabular
data")."""

from __future__ import annotations

import rtdl_revisiting_models as rtdl
from torch import Tensor, nn

from dist_train.config.families import ResNetConfig
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.models.embeddings import TableFeatures
from dist_train.models.registry import register_model


class ResNet(nn.Module):
    """Residual blocks of BatchNorm and two Linears, the authors' module, over the columns of a table.

    Shapes: numeric (rows, num_numeric), flags (rows, num_flags), codes (rows, num_categorical) -> logits
    (rows, classes).
    """

    def __init__(self, spec: FeatureSpec, config: ResNetConfig) -> None:
        super().__init__()
        self.features = TableFeatures(spec, config)
        self.network = rtdl.ResNet(
            d_in=self.features.width,
            d_out=spec.num_classes,
            n_blocks=config.blocks,
            d_block=config.width,
            d_hidden_multiplier=config.hidden_ratio,
            dropout1=config.dropout,
            dropout2=config.residual_dropout,
        )

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Logits of the rows."""
        logits: Tensor = self.network(self.features(numeric, flags, codes))
        return logits


@register_model("resnet", ResNetConfig)
def build(spec: FeatureSpec, config: ResNetConfig) -> nn.Module:
    """ResNet over the columns of the table."""
    return ResNet(spec, config)
