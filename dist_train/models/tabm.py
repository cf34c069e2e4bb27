"""TabM (Gorishniy, Kotelnikov and Babenko 2025, "TabM: advancing tabular deep learning with parameter-efficient
ensembling"), made of the authors' modules."""

from __future__ import annotations

import tabm
from torch import Tensor, nn

from dist_train.config.families import TabMConfig
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.models.embeddings import TableFeatures
from dist_train.models.registry import register_model

_ARCHITECTURES = {"all": "tabm", "first": "tabm-mini", "packed": "tabm-packed"}
# The authors' modules keep biases and scaling factors of members as matrices; as vectors are, they are not decayed.
_NO_WEIGHT_DECAY = {
    tabm.LinearBatchEnsemble: ("r", "s", "bias"),
    tabm.LinearEnsemble: ("bias",),
    tabm.ElementwiseAffine: ("weight",),
}


class MemberNetworks(nn.Module):
    """The members side by side: (rows, features) -> logits (rows, members, classes)."""

    row_wise = True
    fusible_members = True

    def __init__(self, config: TabMConfig, widths: list[int], num_classes: int, scaling: str) -> None:
        super().__init__()
        shared = config.adapters != "packed"
        self.backbone = tabm.make_tabm_backbone(
            d_in=sum(widths),
            n_blocks=config.blocks,
            d_block=config.width,
            dropout=config.dropout,
            k=config.members,
            arch_type=_ARCHITECTURES[config.adapters],
            start_scaling_init=scaling if shared else None,
            start_scaling_init_chunks=widths if shared else None,
        )
        self.output = tabm.LinearEnsemble(config.width, num_classes, k=config.members)
        for module in self.modules():
            names = _NO_WEIGHT_DECAY.get(type(module))
            if names:
                module.no_weight_decay = names  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each member."""
        if self.training or type(self.backbone) is not tabm.MLPBackboneBatchEnsemble:
            logits: Tensor = self.output(self.backbone(tabm.ensemble_view(x, self.output.k, self.training)))
            return logits
        # Factors go into the weights: nothing of (rows, members, features) is made.
        hidden = x.unsqueeze(0)
        for block in self.backbone.blocks:
            linear, activation, _ = block
            weights = linear.weight * linear.r.unsqueeze(1) * linear.s.unsqueeze(2)
            hidden = activation(hidden @ weights.transpose(1, 2) + linear.bias.unsqueeze(1))
        by_member: Tensor = hidden @ self.output.weight + self.output.bias.unsqueeze(1)
        return by_member.transpose(0, 1)


class TabM(nn.Module):
    """An ensemble of multilayer perceptrons that share their weight matrices and differ in scaling factors.

    Shapes: numeric (rows, num_numeric), flags (rows, num_flags), codes (rows, num_categorical) -> logits
    (rows, members, classes).
    """

    row_wise = True

    def __init__(self, spec: FeatureSpec, config: TabMConfig) -> None:
        super().__init__()
        self.features = TableFeatures(spec, config)
        embedded = config.numeric_embedding != "none" and spec.num_numeric > 0
        scaling = "normal" if embedded else "random-signs"
        self.members = MemberNetworks(config, self.features.widths, spec.num_classes, scaling)

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Logits of each member."""
        logits: Tensor = self.members(self.features(numeric, flags, codes))
        return logits


@register_model("tabm", TabMConfig)
def build(spec: FeatureSpec, config: TabMConfig) -> nn.Module:
    """TabM over the columns of the table."""
    return TabM(spec, config)
