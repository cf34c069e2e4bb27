"""Numbers as vectors (Gorishniy, Rubachev and Babenko 2022, "On embeddings for numerical features")."""

from __future__ import annotations

import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config.families import FeatureKeys
from dist_train.data.encoding.scaling import scaled
from dist_train.data.encoding.spec import FeatureSpec, NumericColumn
from dist_train.errors import UserError

# Narrower bins are joined: beyond the outermost knots a function goes on with the slope of its last bin.
NARROWEST_BIN = 2.0**-7


class NumericEmbeddings(nn.Module):
    """Each number of a row as `keys.numeric_width` numbers, side by side; as itself where `numeric_embedding` is none.

    Shapes: (rows, num_numeric) floating point -> (rows, width) of the same type; `widths` has the values of each
    column. A missing cell is the number that the encoder puts in its place. The modules inside are those of the
    authors' package.
    """

    row_wise = True

    def __init__(self, spec: FeatureSpec, keys: FeatureKeys) -> None:
        super().__init__()
        kind = keys.numeric_embedding if spec.num_numeric else "none"
        self.widths = [keys.numeric_width if kind != "none" else 1] * spec.num_numeric
        self.width = sum(self.widths)
        self.embeddings: Any = None
        if kind == "piecewise_linear":
            self.embeddings = _piecewise_linear(spec, keys)
        elif kind == "periodic":
            self.embeddings = _periodic(spec, keys)

    def forward(self, numeric: Tensor) -> Tensor:
        """Vectors of the numbers."""
        return numeric if self.embeddings is None else cast(Tensor, self.embeddings(numeric).flatten(1))


def bin_edges(column: NumericColumn, num_bins: int, by: str = "quantiles") -> Tensor:
    """Knots of a column in the units of its encoded numbers, (edges,) float32, increasing: 2 to `num_bins` + 1.

    They are the quantiles at evenly spaced fractions of the training rows, or the edges by the target. Two that are
    nearer than NARROWEST_BIN are one. A column that holds one number or none has one bin, from -1 to 1. Where a spec
    has no quantiles, the knots are evenly spaced from -3 to 3.

    Raises:
        UserError: the column was fitted without edges by the target.
    """
    if column.scale == 0:
        return torch.tensor([-1.0, 1.0])
    if not column.quantiles:
        return torch.linspace(-3, 3, num_bins + 1)
    if by == "target":
        chosen = _edges_by_target(column)
    else:
        known = np.asarray(column.quantiles)
        chosen = np.interp(np.linspace(0, 1, num_bins + 1), np.linspace(0, 1, len(known)), known)
    found = scaled(torch.from_numpy(chosen), column).tolist()
    edges = found[:1]
    for edge in found[1:]:
        if edge - edges[-1] >= NARROWEST_BIN:
            edges.append(edge)
    return torch.tensor(edges)


def _edges_by_target(column: NumericColumn) -> np.ndarray[Any, Any]:
    if not column.target_edges:
        raise UserError(
            f"numeric_bins_by=target: column {column.name!r} was encoded without bins by the target, as those of a "
            "prepared table are: give the files that it was made of, or set numeric_bins_by=quantiles"
        )
    return np.asarray(column.target_edges)


def _piecewise_linear(spec: FeatureSpec, keys: FeatureKeys) -> Any:
    # Imported here: it loads scikit-learn, for which a model without these modules must not wait.
    import rtdl_num_embeddings as rtdl

    bins = [bin_edges(column, keys.numeric_bins, keys.numeric_bins_by) for column in spec.numeric]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .* feature has just two bin edges")
        module = rtdl.PiecewiseLinearEmbeddings(bins, keys.numeric_width, activation=False, version="B")
    module.linear0.no_weight_decay = ("bias",)
    return module


def _periodic(spec: FeatureSpec, keys: FeatureKeys) -> Any:
    import rtdl_num_embeddings as rtdl

    module = rtdl.PeriodicEmbeddings(
        spec.num_numeric,
        keys.numeric_width,
        n_frequencies=keys.numeric_frequencies,
        frequency_init_scale=keys.numeric_frequency_scale,
        lite=False,
    )
    module.periodic.no_weight_decay = ("weight",)
    module.linear.no_weight_decay = ("bias",)
    return module
