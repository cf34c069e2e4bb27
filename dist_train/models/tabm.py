"""TabM (Gorishniy, Kotelnikov and Babenko 2025, "TabM: advancing tabular deep learning with parameter-efficient
ensembling"), made of the authors' modules."""

from __future__ import annotations

import tabm
from torch import Tensor, nn

from dist_train.config.families import TabMConfig
from dist_train.data.spec import FeatureSpec
from dist_train.models.embeddings import TableFeatures
from dist_train.models.registry import register_model

_ARCHITECTURES = {"all": "tabm", "first": "tabm-mini", "packed": "tabm-packed"}
# The authors' modules keep biases and scaling factors of members as matrices; as vectors are, they are not decayed.
_NO_WEIGHT_DECAY = {
    tabm.LinearBatchEnsemble: ("r", "s", "bias"),
    tabm.LinearEnsemble: ("bias",),
    tabm.ElementwiseAffine: ("weight",),
}


class TabM(nn.Module):
    """An ensemble of multilayer perceptrons that share their weight matrices and differ in scaling factors.

    Shapes: numeric (rows, num_numeric), flags (rows, num_flags), codes (rows, num_categorical) -> logits
    (rows, members, classes).
    """

    row_wise = True

    def __init__(self, spec: FeatureSpec, config: TabMConfig) -> None:
        super().__init__()
        self.features = TableFeatures(spec, config)
        self.members = tabm.EnsembleView(k=config.members)
        shared = config.adapters != "packed"
        embedded = config.numeric_embedding != "none" and spec.num_numeric > 0
        self.backbone = tabm.make_tabm_backbone(
            d_in=self.features.width,
            n_blocks=config.blocks,
            d_block=config.width,
            dropout=config.dropout,
            k=config.members,
            arch_type=_ARCHITECTURES[config.adapters],
            start_scaling_init=("normal" if embedded else "random-signs") if shared else None,
            start_scaling_init_chunks=self.features.widths if shared else None,
        )
        self.output = tabm.LinearEnsemble(config.width, spec.num_classes, k=config.members)
        for module in self.modules():
            names = _NO_WEIGHT_DECAY.get(type(module))
            if names:
                module.no_weight_decay = names  # type: ignore[assignment]

    def forward(self, numeric: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        """Logits of each member."""
        logits: Tensor = self.output(self.backbone(self.members(self.features(numeric, flags, codes))))
        return logits


@register_model("tabm", TabMConfig)
def build(spec: FeatureSpec, config: TabMConfig) -> nn.Module:
    """TabM over the columns of the table."""
    return TabM(spec, config)
